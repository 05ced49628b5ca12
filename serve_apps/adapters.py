"""Which adapter is in which slot of the bank: loaded on first use, the least recently used one makes room."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.model_card import ModelCard
from cluster.models.fingerprint import ensure_same_base
from cluster.registry import AdapterVersion, Registry, UnknownAdapter
from serve_apps.engine import Engine
from serve_apps.refusals import Refusal
from serve_apps.token_engine import AdapterLoader

Key = tuple[str, str]
"""Served name and content: a name that was removed and given again is another adapter."""


@dataclass(kw_only=True, slots=True)
class Slot:
    """One place for an adapter in the engine."""

    index: int
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
        try:
            return await asyncio.to_thread(self._registry.resolve, self._card.name, ref)
        except UnknownAdapter as error:
            raise Refusal(str(error), param="model", code="model_not_found", status=404) from error
        except UserError as error:
            raise Refusal(str(error), param="model", code="adapter_unusable") from error

    async def _enter(self, version: AdapterVersion) -> Slot:
        key = (version.served_name, repr(sorted(version.manifest.files.items())))
        async with self._changed:
            if key not in self._loaded:
                # Under the lock, so that two first requests load an adapter once; others wait for the disk meanwhile.
                slot = await self._free_slot()
                try:
                    await self._load(version, slot)
                except BaseException:
                    self._loaded[("", str(slot.index))] = slot  # empty again, and the first to be given away
                    self._loaded.move_to_end(("", str(slot.index)), last=False)
                    raise
                self._loaded[key] = slot
            self._loaded.move_to_end(key)
            slot = self._loaded[key]
            slot.num_users += 1
            return slot

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
        await self._changed.wait_for(lambda: any(slot.num_users == 0 for slot in self._loaded.values()))
        key = next(key for key, slot in self._loaded.items() if slot.num_users == 0)
        return self._loaded.pop(key)

    async def _load(self, version: AdapterVersion, slot: Slot) -> None:
        try:
            # Not to be cut short by a client that leaves: the thread would go on writing into a slot given away.
            await asyncio.shield(asyncio.to_thread(self._load_now, version, slot.index))
        except UserError as error:
            raise Refusal(str(error), param="model", code="adapter_unusable") from error

    def _load_now(self, version: AdapterVersion, index: int) -> None:
        ensure_same_base(version, self._card)
        self._loader.load(index, version, self._registry.fetch(version))
