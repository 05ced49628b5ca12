import time
from collections.abc import Callable
from pathlib import Path

import pytest
from registered import plain_manifest

from cluster.alias import Canary
from cluster.canary import start_canary
from cluster.lookup import Lookup
from cluster.registry import Registry, UnknownAdapter
from cluster.store import REMOTE_STAMP_S


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(params=["disk", "object store"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry" if request.param == "disk" else "mock:///adapters")


def within(seconds: float, claim: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + seconds
    while not (is_true := claim()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return is_true


def test_a_change_is_seen_within_a_second(registry: Registry, adapter: Path) -> None:
    lookup = Lookup(registry)
    registry.add(adapter, plain_manifest())
    assert lookup.resolve("tiny", "shop").version == 1
    registry.add(adapter, plain_manifest())
    assert within(1.5 * REMOTE_STAMP_S, lambda: lookup.resolve("tiny", "shop").version == 2)
    registry.rollback("tiny", "shop")
    assert within(1.5 * REMOTE_STAMP_S, lambda: lookup.resolve("tiny", "shop").version == 1)
    assert lookup.resolve("tiny", "shop@2").version == 2


def test_on_a_disk_a_change_is_seen_at_once(tmp_path: Path, adapter: Path) -> None:
    registry = Registry(tmp_path / "registry")
    lookup = Lookup(registry)
    for _ in range(2):
        registry.add(adapter, plain_manifest())
    for _ in range(50):
        for version in (1, 2):
            registry.promote("tiny", "shop", version)
            assert lookup.resolve("tiny", "shop").version == version


def test_what_was_deleted_is_not_answered_any_more(registry: Registry, adapter: Path) -> None:
    def is_gone(ref: str) -> bool:
        try:
            lookup.resolve("tiny", ref)
        except UnknownAdapter:
            return True
        return False

    lookup = Lookup(registry)
    for _ in range(2):
        registry.add(adapter, plain_manifest())
    assert not is_gone("shop")
    assert not is_gone("shop@1")
    registry.remove("tiny", "shop@1")
    assert within(1.5 * REMOTE_STAMP_S, lambda: is_gone("shop@1"))
    assert not is_gone("shop")
    registry.remove("tiny", "shop")
    assert within(1.5 * REMOTE_STAMP_S, lambda: is_gone("shop"))


def test_users_are_divided_by_the_canary_and_exact_versions_are_not(registry: Registry, adapter: Path) -> None:
    for _ in range(2):
        registry.add(adapter, plain_manifest())
    registry.promote("tiny", "shop", 1)
    start_canary(registry, "tiny", "shop", Canary(version=2, percent=50))
    lookup = Lookup(registry)
    got = [lookup.resolve("tiny", "shop", user=f"{i}").version for i in range(400)]
    assert abs(got.count(2) - 200) < 40  # four deviations of 10
    assert {lookup.resolve("tiny", "shop@1", user=f"{i}").version for i in range(400)} == {1}


def test_unknown_names_are_answered_with_what_there_is(registry: Registry, adapter: Path) -> None:
    registry.add(adapter, plain_manifest())
    lookup = Lookup(registry)
    for ref, words in (("shpo", "registered: shop"), ("shop@7", "there are shop@1"), ("../x", "no adapter")):
        with pytest.raises(UnknownAdapter, match=words):
            lookup.resolve("tiny", ref)


def test_an_answer_that_is_kept_reads_no_file(
    registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(adapter, plain_manifest())
    lookup = Lookup(registry)
    monkeypatch.setattr("cluster.store.REMOTE_STAMP_S", 1e6)
    lookup.resolve("tiny", "shop")
    for method in ("read", "folders", "exists"):
        monkeypatch.setattr(registry._store, method, lambda *_: pytest.fail("the store was asked"))
    assert lookup.resolve("tiny", "shop").version == 1


def test_what_is_kept_is_bounded(registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.lookup.MAX_KEPT", 8)
    lookup = Lookup(registry)
    for i in range(12):
        registry.add(adapter, plain_manifest(f"a{i}"))
        assert lookup.resolve("tiny", f"a{i}").name == f"a{i}"
        assert len(lookup._kept) <= 8
