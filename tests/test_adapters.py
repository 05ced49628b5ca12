"""Slots, pins and loads, with a loader that only writes down what it is told."""

import asyncio
import errno
import os
import threading
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from registered import manifest_of
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard
from cluster.pins import pin, unpin
from cluster.registry import AdapterVersion, Registry
from serve_apps.adapters import AdapterSlots
from serve_apps.refusals import Refusal


@dataclass
class Loader:
    """An engine's slots as a list of names."""

    slots: dict[int, str] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def load(self, slot: int, version: AdapterVersion, folder: Path) -> None:
        assert self.gate.wait(20)
        assert folder.is_dir()
        self.loads.append(version.served_name.partition(":")[2])
        self.slots[slot] = self.loads[-1]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture
def registry(tmp_path: Path, card: ModelCard) -> Registry:
    registry = Registry(tmp_path / "registry")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        (folder / "adapter_model.safetensors").write_text(name)
        registry.add(folder, manifest_of(card, name))
    return registry


async def use(slots: AdapterSlots, *refs: str) -> None:
    for ref in refs:
        async with slots.lease(ref):
            pass


def test_the_least_recently_used_makes_room(registry: Registry, card: ModelCard) -> None:
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=2)
    asyncio.run(use(slots, "a", "b", "a", "c", "a", "b"))
    assert loader.loads == ["a@1", "b@1", "c@1", "b@1"]
    assert set(loader.slots.values()) == {"a@1", "b@1"}


def test_a_pinned_adapter_stays_once_it_is_there(registry: Registry, card: ModelCard) -> None:
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=2)

    async def run() -> None:
        await use(slots, "a", "b")
        pin(registry, card.name, "a", max_loras=2)  # while the replica runs
        await use(slots, "c", "d", "b", "a")
        assert loader.loads == ["a@1", "b@1", "c@1", "d@1", "b@1"]
        unpin(registry, card.name, "a")
        await use(slots, "b", "c", "b")
        assert loader.loads[5:] == ["c@1"]
        assert set(loader.slots.values()) == {"b@1", "c@1"}

    asyncio.run(run())


def test_a_pin_holds_the_version_that_the_name_means(registry: Registry, card: ModelCard, tmp_path: Path) -> None:
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=2)
    pin(registry, card.name, "a", max_loras=2)

    async def run() -> None:
        await use(slots, "a")
        registry.add(tmp_path / "adapter", manifest_of(card, "a"))
        await use(slots, "b", "c", "a", "b", "c")
        assert loader.loads == ["a@1", "b@1", "c@1", "a@2", "b@1", "c@1"]
        assert set(loader.slots.values()) == {"a@2", "c@1"}

    asyncio.run(run())


def test_a_replica_with_fewer_slots_than_pins_still_lets_others_in(registry: Registry, card: ModelCard) -> None:
    for name in ("a", "b"):
        pin(registry, card.name, name, max_loras=3)
    for max_loras, expected in ((1, ["a@1", "b@1", "c@1", "b@1"]), (2, ["a@1", "b@1", "c@1"])):
        loader = Loader()
        slots = AdapterSlots(loader, card, registry, max_loras=max_loras)
        asyncio.run(asyncio.wait_for(use(slots, "a", "b", "c", "b"), 20))
        assert loader.loads == expected


def test_requests_wait_while_all_slots_are_in_use(registry: Registry, card: ModelCard) -> None:
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=1)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(slots.lease("a"))
            waiting = asyncio.create_task(use(slots, "b"))
            await asyncio.sleep(0.2)
            assert loader.loads == ["a@1"]
        await asyncio.wait_for(waiting, 20)
        assert loader.loads == ["a@1", "b@1"]

    asyncio.run(run())


def test_an_adapter_in_use_survives_its_deletion(registry: Registry, card: ModelCard, tmp_path: Path) -> None:
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=2)

    async def run() -> None:
        async with slots.lease("a@1") as lease:
            registry.add(tmp_path / "adapter", manifest_of(card, "a"))
            registry.remove(card.name, "a@1")
            await use(slots, "b", "c", "a")
            assert loader.slots[lease.slot] == "a@1"
        with pytest.raises(Refusal, match="no version '1'") as caught:
            await use(slots, "a@1")
        assert caught.value.status == 404

    asyncio.run(run())


def test_a_client_that_leaves_during_a_load_gives_its_slot_to_nobody_before_the_end(
    registry: Registry, card: ModelCard
) -> None:
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=1)

    async def run() -> None:
        loader.gate.clear()
        leaving = asyncio.create_task(use(slots, "a"))
        await asyncio.sleep(0.2)
        leaving.cancel()
        following = asyncio.create_task(use(slots, "b"))
        await asyncio.sleep(0.2)
        leaving.cancel()  # a second time, while it waits for the thread
        await asyncio.sleep(0.05)
        loader.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await following
        assert loader.loads == ["a@1", "b@1"]
        assert loader.slots == {0: "b@1"}
        await use(slots, "a")
        assert loader.slots == {0: "a@1"}

    asyncio.run(run())


def test_those_whose_adapter_is_there_do_not_wait_for_the_download_of_another(
    registry: Registry, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = AdapterSlots(Loader(), card, registry, max_loras=2)
    fetch, downloaded = registry.fetch, threading.Event()

    def slow(version: AdapterVersion) -> Path:
        assert version.name == "a" or downloaded.wait(20)
        return fetch(version)

    monkeypatch.setattr(registry, "fetch", slow)

    async def run() -> None:
        await use(slots, "a")
        downloading = asyncio.create_task(use(slots, "b"))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(use(slots, "a"), 5)
        downloaded.set()
        await downloading

    asyncio.run(run())


def test_a_full_disk_is_a_503_and_the_slots_go_on(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    registry = Registry("mock:///disk/adapters")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    for name in ("a", "b"):
        registry.add(tmp_path / "adapter", manifest_of(card, name))
    loader = Loader()
    slots = AdapterSlots(loader, card, registry, max_loras=1)

    def fill(source: str, target: str, **_: object) -> None:
        (Path(target) / "adapter_model.safetensors").write_text("weig")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def run() -> None:
        await use(slots, "a")
        with monkeypatch.context() as patch:
            patch.setattr("cluster.store.fs.copy_files", fill)
            with pytest.raises(Refusal, match="No space left on device") as caught:
                await use(slots, "b")
            assert (caught.value.status, caught.value.retry_after_s) == (503, 10)
            await use(slots, "a")  # what is in memory answers on
        assert loader.loads == ["a@1"]
        await use(slots, "b")
        assert loader.slots == {0: "b@1"}

    asyncio.run(run())


def test_a_plan_without_room_for_adapters_says_so(registry: Registry, card: ModelCard) -> None:
    slots = AdapterSlots(Loader(), card, registry, max_loras=0)
    with pytest.raises(Refusal, match="served without adapters"):
        asyncio.run(use(slots, "a"))
