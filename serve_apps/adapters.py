"""Which adapter is in which slot of the engine: loaded on first use, the least recently used one makes room."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.errors import UserError
from cluster.lookup import Lookup
from cluster.model_card import ModelCard
from cluster.models.fingerprint import ensure_same_base
from cluster.registry import AdapterVersion, Registry
from serve_apps import short_thread
from serve_apps.adapter_refusals import adapter_errors
from serve_apps.engine import Engine
from serve_apps.refusals import Refusal
from serve_apps.token_engine import AdapterLoader

Key = tuple[str, str]
"""Served name and content: a name that was removed and given again is another adapter."""


@dataclass(kw_only=True, slots=True)
class Slot:
    """One place for an adapter in the engine."""

    index: int
    version: AdapterVersion | None = None
    """None while it is empty."""
    num_users: int = 0
    """Requests in flight; a slot in use is not given away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to run one request through an adapter."""

    version: AdapterVersion
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BankLoader:
    """The transformers engine's adapters: slots of a bank, which the model gets with the first one."""

    engine: Engine
    max_loras: int
    max_lora_rank: int
    target_modules: tuple[str, ...]

    def load(self, slot: int, version: AdapterVersion, folder: Path) -> None:  # noqa: ARG002
        """Put the adapter into the bank; raises `AdapterFilesError`."""
        bank = self.engine.bank or self.engine.attach_bank(
            num_slots=self.max_loras, max_r=self.max_lora_rank, target_modules=self.target_modules
        )
        with self.engine.paused():
            bank.load_slot(slot, folder)


class AdapterSlots:
    """Leases the slots of an engine to requests."""

    def __init__(self, loader: AdapterLoader, card: ModelCard, registry: Registry, *, max_loras: int) -> None:
        self._loader = loader
        self._card = card
        self._registry = registry
        self._lookup = Lookup(registry)
        self._max_loras = max_loras
        self._loaded: OrderedDict[Key, Slot] = OrderedDict()  # the least recently used first
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def lease(self, ref: str) -> AsyncIterator[Lease]:
        """Hold the adapter that `ref` (`name` or `name@3`) means now for as long as the body runs.

        Waits while all slots are in use by other adapters.

        Raises:
            Refusal: no such adapter, or one that cannot run on this model; the engine goes on.
        """
        version = await self._resolve(ref)
        slot = await self._enter(version)
        try:
            yield Lease(version=version, slot=slot.index)
        finally:
            slot.num_users -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _resolve(self, ref: str) -> AdapterVersion:
        with adapter_errors():
            return await asyncio.to_thread(self._lookup.resolve, self._card.name, ref)

    async def _enter(self, version: AdapterVersion) -> Slot:
        key = (version.served_name, repr(sorted(version.manifest.files.items())))
        folder = None
        while True:
            async with self._changed:
                if key not in self._loaded and folder is not None:
                    # Under the lock, so that two first requests load an adapter once.
                    await self._fill(await self._free_slot(), key, version, folder)
                if key in self._loaded:
                    self._loaded.move_to_end(key)
                    slot = self._loaded[key]
                    slot.num_users += 1
                    return slot
            # Without the lock, so that those whose adapter is there do not wait for this one's download.
            with adapter_errors():
                folder = await asyncio.to_thread(self._fetch, version)

    def _fetch(self, version: AdapterVersion) -> Path:
        ensure_same_base(version, self._card)
        return self._registry.fetch(version)

    async def _fill(self, slot: Slot, key: Key, version: AdapterVersion, folder: Path) -> None:
        slot.version = None
        try:
            with adapter_errors():
                await _to_its_end(partial(self._loader.load, slot.index, version, folder))
        except BaseException:
            self._loaded[("", str(slot.index))] = slot  # empty, and the first to be given away
            self._loaded.move_to_end(("", str(slot.index)), last=False)
            raise
        slot.version = version
        self._loaded[key] = slot

    async def _free_slot(self) -> Slot:
        if self._max_loras == 0:
            raise Refusal(
                f"{self._card.name} is served without adapters; its plan leaves no room for them.",
                param="model",
                code="adapter_unusable",
            )
        if len(self._loaded) < self._max_loras:
            taken = {slot.index for slot in self._loaded.values()}
            return Slot(index=min(set(range(self._max_loras)) - taken))
        while (key := await asyncio.to_thread(self._least_needed)) is None:
            await self._changed.wait()
        return self._loaded.pop(key)

    def _least_needed(self) -> Key | None:
        """Return the adapter that makes room, or None while all that may be evicted are in use.

        A replica smaller than the one for which adapters were pinned keeps the pinned ones that were used last, all
        but one: a request for any other adapter has to get in.
        """
        pinned = [key for key, slot in self._loaded.items() if self._is_pinned(slot)]
        kept = set(pinned[-(self._max_loras - 1) :]) if self._max_loras > 1 else set()
        return next((key for key, slot in self._loaded.items() if slot.num_users == 0 and key not in kept), None)

    def _is_pinned(self, slot: Slot) -> bool:
        if slot.version is None:
            return False
        try:
            alias = self._lookup.alias(slot.version.model, slot.version.name)
        except UserError:  # it was deleted meanwhile
            return False
        return alias.is_pinned and alias.version == slot.version.version


async def _to_its_end(work: Callable[[], None]) -> None:
    """Run `work` in a thread, and return or raise when it is over, not before, even where a client leaves meanwhile.

    Else the thread would go on writing into a slot that has been given away.
    """
    task = asyncio.create_task(short_thread.run_async(work))
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen, so that asyncio does not report it as forgotten
        raise cancelled
    task.result()
