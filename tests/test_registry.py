import errno
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from registered import plain_manifest as manifest

from cluster.alias import Canary
from cluster.canary import NothingToTry, start_canary
from cluster.errors import UserError
from cluster.pins import TooManyPins, pin, unpin
from cluster.registry import (
    AdapterInUse,
    AdapterNotFetched,
    BrokenAdapter,
    InvalidAdapterName,
    Registry,
    RegistryUnwritable,
    UnknownAdapter,
)
from cluster.store import FolderStore


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_versions_count_from_one_and_the_newest_is_current(registry: Registry, adapter: Path) -> None:
    first, second = registry.add(adapter, manifest()), registry.add(adapter, manifest())
    assert (first.version, second.version) == (1, 2)
    assert second.served_name == "tiny:shop@2"
    assert registry.resolve("tiny", "shop").version == 2
    assert registry.resolve("tiny", "shop@1") == first
    assert registry.names("tiny") == ("shop",)
    assert [v.version for v in registry.list()] == [1, 2]


def test_a_version_can_be_added_without_being_served_by_its_name(registry: Registry, adapter: Path) -> None:
    registry.add(adapter, manifest())
    registry.add(adapter, manifest(), promote=False)
    assert registry.resolve("tiny", "shop").version == 1


def test_the_manifest_holds_the_hash_of_every_file(registry: Registry, adapter: Path) -> None:
    added = registry.add(adapter, manifest())
    assert added.manifest.files == {
        "adapter_config.json": hashlib.sha256(b"{}").hexdigest(),
        "adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }
    assert (registry.fetch(added) / "adapter_model.safetensors").read_bytes() == b"weights"


def test_rollback_returns_to_the_version_before_each_promotion(registry: Registry, adapter: Path) -> None:
    for _ in range(3):
        registry.add(adapter, manifest())
    assert registry.rollback("tiny", "shop").version == 2
    assert registry.promote("tiny", "shop", 3).version == 3
    assert registry.rollback("tiny", "shop").version == 2
    assert registry.rollback("tiny", "shop").version == 1
    with pytest.raises(UnknownAdapter, match="nothing to roll back to"):
        registry.rollback("tiny", "shop")


def test_promoting_the_current_version_changes_nothing(registry: Registry, adapter: Path) -> None:
    registry.add(adapter, manifest())
    assert registry.promote("tiny", "shop", 1).previous == ()


def test_removing(registry: Registry, adapter: Path) -> None:
    for _ in range(2):
        registry.add(adapter, manifest())
    with pytest.raises(AdapterInUse, match="promote another version"):
        registry.remove("tiny", "shop@2")
    registry.remove("tiny", "shop@1")
    assert registry.versions("tiny", "shop") == (2,)
    registry.remove("tiny", "shop")
    assert registry.list() == ()
    with pytest.raises(UnknownAdapter):
        registry.remove("tiny", "shop")


def test_what_is_not_there_is_answered_with_what_is(registry: Registry, adapter: Path) -> None:
    registry.add(adapter, manifest())
    with pytest.raises(UnknownAdapter, match="no adapter 'shpo'; registered: shop"):
        registry.resolve("tiny", "shpo")
    with pytest.raises(UnknownAdapter, match="no version '7'; there are shop@1"):
        registry.resolve("tiny", "shop@7")
    with pytest.raises(UnknownAdapter):
        registry.resolve("tiny", "../other")
    with pytest.raises(UnknownAdapter):
        registry.resolve("tiny", "shop@01")


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "a@1", "a/b", ".hidden", "x" * 65])
def test_a_name_that_cannot_be_served_is_refused(registry: Registry, adapter: Path, name: str) -> None:
    with pytest.raises(InvalidAdapterName):
        registry.add(adapter, manifest(name))


def test_a_changed_or_missing_file_is_found_at_fetch(registry: Registry, adapter: Path) -> None:
    added = registry.add(adapter, manifest())
    weights = Path(added.uri) / "adapter_model.safetensors"
    weights.write_bytes(b"other")
    with pytest.raises(BrokenAdapter, match="not the file that was registered"):
        registry.fetch(added)
    weights.unlink()
    with pytest.raises(BrokenAdapter, match="is missing"):
        registry.fetch(added)


def test_a_broken_manifest_names_its_file(registry: Registry, adapter: Path) -> None:
    added = registry.add(adapter, manifest())
    path = Path(added.uri) / "manifest.json"
    path.write_text("{")
    with pytest.raises(BrokenAdapter, match=r"manifest\.json is broken"):
        registry.resolve("tiny", "shop")
    path.write_text(json.dumps({"model": "tiny"}))
    with pytest.raises(BrokenAdapter, match="Field required"):
        registry.resolve("tiny", "shop")


def test_a_folder_without_manifest_is_no_version(registry: Registry, adapter: Path) -> None:
    added = registry.add(adapter, manifest())
    (Path(added.uri).parent / "v2").mkdir()
    assert registry.versions("tiny", "shop") == (1,)


def test_many_writers_get_a_version_each(registry: Registry, adapter: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: registry.add(adapter, manifest(), promote=False).version, range(16)))
    assert sorted(versions) == list(range(1, 17))


def test_a_folder_that_comes_and_goes_is_listed_or_is_not(tmp_path: Path) -> None:
    """As when the first version of an adapter is registered while somebody lists the registry."""
    store, over = FolderStore(tmp_path), time.monotonic() + 1.0

    def come_and_go() -> None:
        while time.monotonic() < over:
            (tmp_path / "shop").mkdir()
            (tmp_path / "shop").rmdir()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(come_and_go)
        while time.monotonic() < over:
            assert store.folders("shop") == []


def test_a_store_that_cannot_be_written_keeps_the_adapter(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        registry.add(adapter, manifest())
    assert adapter.exists()


def test_a_uri_is_a_registry_too(tmp_path: Path, adapter: Path) -> None:
    registry = Registry(f"file://{tmp_path}/by-uri")
    added = registry.add(adapter, manifest())
    assert registry.resolve("tiny", "shop") == added
    assert registry.fetch(added).is_dir()


def test_the_first_version_is_what_the_name_means(registry: Registry, adapter: Path) -> None:
    registry.add(adapter, manifest(), promote=False)
    assert registry.resolve("tiny", "shop").version == 1


def test_the_number_of_a_deleted_version_is_not_given_again(registry: Registry, adapter: Path) -> None:
    for _ in range(3):
        registry.add(adapter, manifest())
    registry.promote("tiny", "shop", 2)
    registry.remove("tiny", "shop@3")
    registry.remove("tiny", "shop@1")
    assert registry.add(adapter, manifest()).version == 4


def test_a_candidate_is_neither_deleted_nor_what_is_current(registry: Registry, adapter: Path) -> None:
    for _ in range(2):
        registry.add(adapter, manifest())
    registry.promote("tiny", "shop", 1)
    with pytest.raises(NothingToTry, match="means version 1"):
        start_canary(registry, "tiny", "shop", Canary(version=1, percent=10))
    with pytest.raises(UnknownAdapter, match="no version '3'"):
        start_canary(registry, "tiny", "shop", Canary(version=3, percent=10))
    start_canary(registry, "tiny", "shop", Canary(version=2, percent=10))
    with pytest.raises(AdapterInUse, match="tries version 2"):
        registry.remove("tiny", "shop@2")
    assert registry.rollback("tiny", "shop").canary is None
    registry.remove("tiny", "shop@2")


def test_pins_leave_a_place_free(registry: Registry, adapter: Path) -> None:
    for name in ("a", "b", "c"):
        registry.add(adapter, manifest(name))
    for name in ("a", "b"):
        assert pin(registry, "tiny", name, max_loras=3).is_pinned
    pin(registry, "tiny", "b", max_loras=3)  # again is nothing new
    with pytest.raises(TooManyPins, match=r"holds 3 .* 2 are pinned \(a, b\)"):
        pin(registry, "tiny", "c", max_loras=3)
    assert not unpin(registry, "tiny", "a").is_pinned
    assert pin(registry, "tiny", "c", max_loras=3).is_pinned
    with pytest.raises(TooManyPins):
        pin(registry, "tiny", "a", max_loras=1)


def test_a_pin_follows_the_name_to_its_next_version(registry: Registry, adapter: Path) -> None:
    registry.add(adapter, manifest())
    pin(registry, "tiny", "shop", max_loras=2)
    registry.add(adapter, manifest())
    assert registry.alias("tiny", "shop").is_pinned


def test_an_object_store_is_a_registry_too(adapter: Path, kajiya_home_of_the_session: Path) -> None:
    registry = Registry("mock:///some/adapters")
    for name in ("shop", "poet"):
        added = registry.add(adapter, manifest(name))
    registry.add(adapter, manifest())
    assert registry.names("tiny") == ("poet", "shop")
    assert registry.resolve("tiny", "shop").version == 2
    fetched = registry.fetch(added)
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"weights"
    registry.remove("tiny", "poet")
    (adapter / "adapter_model.safetensors").write_bytes(b"others")
    again = registry.add(adapter, manifest("poet"))
    assert (registry.fetch(again) / "adapter_model.safetensors").read_bytes() == b"others"


def test_a_full_disk_leaves_no_half_copy_and_the_next_fetch_works(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    registry = Registry("mock:///full/adapters")
    added = registry.add(adapter, manifest())

    def fill(source: str, target: str, **_: object) -> None:
        (Path(target) / "adapter_model.safetensors").write_bytes(b"weig")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("cluster.store.fs.copy_files", fill)
        with pytest.raises(AdapterNotFetched, match="No space left on device"):
            registry.fetch(added)
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []
    assert (registry.fetch(added) / "adapter_model.safetensors").read_bytes() == b"weights"


def test_a_full_disk_does_not_lose_what_a_name_means(
    registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        registry.add(adapter, manifest())

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fill)
        with pytest.raises(RegistryUnwritable, match="No space left"):
            registry.promote("tiny", "shop", 1)
    assert registry.alias("tiny", "shop").version == 2
    home = Path(registry.resolve("tiny", "shop").uri).parent
    assert sorted(path.name for path in home.iterdir()) == ["alias.json", "v1", "v2"]


def test_a_thousand_adapters_are_named_without_reading_one(
    registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(adapter, manifest("a0"))
    home = Path(registry.resolve("tiny", "a0").uri).parent
    for i in range(1, 1000):
        shutil.copytree(home, home.parent / f"a{i}")
    (home.parent / "unfinished").mkdir()
    monkeypatch.setattr(registry._store, "read", lambda _: pytest.fail("a file was read"))
    began_s = time.perf_counter()
    assert len(registry.names("tiny")) == 1000
    assert time.perf_counter() - began_s < 0.2
