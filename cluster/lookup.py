"""What servers ask the registry with every request, remembered for as long as the adapter is unchanged."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from cluster.alias import Alias
from cluster.registry import AdapterVersion, Registry

Answer = TypeVar("Answer")

MAX_KEPT = 4096
"""Answers in memory; all are forgotten when it is reached."""


class Lookup:
    """Resolves names for a server. A change is seen at once on a disk, within a second on an object store.

    Unchanged, an answer costs one `stat` on a disk and nothing on an object store, however many adapters there are.
    Safe to call from several threads.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._kept: dict[tuple[str, str, str], tuple[Hashable, AdapterVersion | Alias]] = {}

    def resolve(self, model: str, ref: str, *, user: str = "") -> AdapterVersion:
        """Return the version that `ref` (`name` or `name@3`) means for `user`; a canary is for some users only.

        Raises:
            UnknownAdapter, BrokenAdapter: as `Registry.resolve`.
        """
        name, at, _ = ref.partition("@")
        if not at:
            ref = f"{name}@{self.alias(model, name).version_for(f'{model}:{name}', user)}"
        return self._keep((model, name, ref), lambda: self._registry.resolve(model, ref))

    def alias(self, model: str, name: str) -> Alias:
        """Return what `model:name` means; raises as `Registry.resolve`."""

        def read() -> Alias:
            self._registry.resolve(model, name)  # knows best what to say of a name that is not there
            return self._registry.alias(model, name)

        return self._keep((model, name, ""), read)

    def _keep(self, key: tuple[str, str, str], read: Callable[[], Answer]) -> Answer:
        stamp = self._registry.stamp(key[0], key[1])
        kept = self._kept.get(key)
        if kept is not None and stamp is not None and kept[0] == stamp:
            return kept[1]  # type: ignore[return-value] # under this key only answers of this kind are kept
        answer = read()
        if stamp is not None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = (stamp, answer)  # type: ignore[assignment]
        return answer
