import asyncio
import time
from pathlib import Path

import pytest
from registered import plain_manifest

from cluster.alias import Canary
from cluster.canary import start_canary
from cluster.registry import Registry
from serve_apps.call import Call
from serve_apps.facts import ModelFacts
from serve_apps.refusals import Refusal
from serve_apps.versions import Versions, user_of


def facts(revision: str | None = "abc") -> dict[str, ModelFacts]:
    one = ModelFacts(
        name="tiny",
        model_id="org/tiny",
        revision=revision,
        precision="nf4",
        engine="transformers",
        max_model_len=64,
        max_num_seqs=4,
        max_loras=3,
        wake_timeout_s=1,
    )
    return {"tiny": one}


def call(*, user: str | None = None, key_id: str | None = None, client: str = "10.0.0.1") -> Call:
    return Call(request_id="r", method="POST", path="/", client=client, user=user, key_id=key_id)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("KAJIYA_REGISTRY", str(tmp_path / "registry"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    registry = Registry.default()
    for _ in range(2):
        registry.add(tmp_path / "adapter", plain_manifest())
    return registry


def test_answers_say_where_they_come_from(registry: Registry) -> None:
    asked = call()
    assert asyncio.run(Versions(facts()).resolve("tiny:shop", asked)) == "tiny:shop@2"
    assert (asked.model, asked.adapter, asked.version) == ("tiny", "shop", 2)
    assert asked.response_headers == {
        "x-kajiya-model": "tiny",
        "x-kajiya-revision": "abc",
        "x-kajiya-precision": "nf4",
        "x-kajiya-engine": "transformers",
        "x-kajiya-adapter": "shop@2",
        "x-kajiya-data-sha256": "0" * 64,
    }


def test_the_base_has_no_adapters_headers(registry: Registry) -> None:
    asked = call()
    assert asyncio.run(Versions(facts(revision=None)).resolve("tiny", asked)) == "tiny"
    assert set(asked.response_headers) == {"x-kajiya-model", "x-kajiya-precision", "x-kajiya-engine"}
    assert (asked.adapter, asked.version) == (None, None)


def test_an_adapter_that_is_not_there_is_a_404_and_names_the_base(registry: Registry) -> None:
    asked = call()
    with pytest.raises(Refusal, match="registered: shop") as caught:
        asyncio.run(Versions(facts()).resolve("tiny:nobody", asked))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert asked.response_headers["x-kajiya-model"] == "tiny"


def test_a_promotion_and_a_rollback_are_seen_by_the_next_request(registry: Registry) -> None:
    versions = Versions(facts())
    for version in (1, 2, 1):
        registry.promote("tiny", "shop", version)
        assert asyncio.run(versions.resolve("tiny:shop", call())) == f"tiny:shop@{version}"
    registry.rollback("tiny", "shop")
    assert asyncio.run(versions.resolve("tiny:shop", call())) == "tiny:shop@2"


def test_a_canary_asks_for_the_user_then_the_key_then_the_address() -> None:
    assert user_of(call(user="u", key_id="k")) == "user u"
    assert user_of(call(key_id="k")) == "key k"
    assert user_of(call()) == "address 10.0.0.1"


def test_a_user_gets_one_version_from_wherever_the_request_comes(registry: Registry) -> None:
    registry.promote("tiny", "shop", 1)
    start_canary(registry, "tiny", "shop", Canary(version=2, percent=50))
    versions = Versions(facts())

    async def version_of(user: str, client: str) -> str:
        return await versions.resolve("tiny:shop", call(user=user, client=client))

    async def run() -> None:
        first = [await version_of(f"{i}", "10.0.0.1") for i in range(100)]
        second = [await version_of(f"{i}", "10.0.0.2") for i in range(100)]
        assert first == second
        assert abs(first.count("tiny:shop@2") - 50) < 20  # four deviations of 5

    asyncio.run(run())


def test_a_thousand_adapters_do_not_make_a_name_dearer(registry: Registry) -> None:
    home = Path(registry.resolve("tiny", "shop").uri).parent
    versions = Versions(facts())

    async def seconds_per_request() -> float:
        began_s = time.perf_counter()
        for _ in range(50):
            await versions.resolve("tiny:shop", call())
        return (time.perf_counter() - began_s) / 50

    few_s = min(asyncio.run(seconds_per_request()) for _ in range(8))
    for i in range(1000):
        (home.parent / f"a{i}").mkdir()
        (home.parent / f"a{i}" / "alias.json").write_text('{"version": 1}')
    many_s = min(asyncio.run(seconds_per_request()) for _ in range(8))
    assert len(registry.names("tiny")) == 1001
    assert many_s < 1e-3
    assert many_s < 3 * few_s  # the machine is noisy; reading all names would be a hundred times as long
