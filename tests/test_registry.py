import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.manifest import DataSource, Manifest
from cluster.registry import AdapterInUse, BrokenAdapter, InvalidAdapterName, Registry, UnknownAdapter


def manifest(name: str = "shop") -> Manifest:
    return Manifest(
        model="tiny",
        name=name,
        base_model_id="org/tiny",
        base_revision=None,
        base_fingerprint="ab12",
        precision="fp32",
        adapter={"r": 8},
        plan={},
        data=DataSource(file="train.jsonl", sha256="0" * 64, num_samples=3, num_trained_tokens=30),
        metrics={"held_out_loss_after": 0.5},
        library_versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )


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
