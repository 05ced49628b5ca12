import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from registered import plain_manifest

from cluster.keys import KeyRecord
from cluster.registry import Registry
from cluster.scopes import parse_scopes
from serve_apps.admission import Admission, most_answer_tokens
from serve_apps.call import Call
from serve_apps.facts import ModelFacts
from serve_apps.ingress import Ingress
from serve_apps.quotas import Bucket, Quota
from serve_apps.refusals import Refusal
from serve_apps.versions import Versions


@pytest.mark.parametrize(
    ("fields", "call_method", "most"),
    [
        ({"max_tokens": 10}, "chat", 10),
        ({"max_completion_tokens": 10, "max_tokens": 99}, "chat", 10),
        ({}, "chat", 1000),  # as the engine does: what the context leaves
        ({"max_tokens": 10**9, "n": 2}, "chat", 2000),
        ({"max_tokens": 10, "n": 3}, "chat", 30),
        ({"max_tokens": -5, "n": -5}, "chat", 0),
        ({"prompt": "a"}, "completions", 16),
        ({"prompt": ["a", "b"], "max_tokens": 5, "n": 2}, "completions", 20),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, "completions", 5),  # one prompt of three tokens
        ({"prompt": [[1, 2], [3]], "max_tokens": 5}, "completions", 10),
        ({"prompt": []}, "completions", 16),
        ({"input": "a", "max_tokens": 5}, "embeddings", 0),
    ],
)
def test_the_most_that_answers_may_have(fields: dict[str, Any], call_method: str, most: int) -> None:
    assert most_answer_tokens(fields, call_method, 1000) == most


@pytest.mark.parametrize(
    ("num_tokens", "status", "charged"),
    [(7, 200, 7), (0, 200, 50), (0, 499, 50), (0, 500, 50), (0, 400, 0), (0, 403, 0), (0, 429, 0), (0, 503, 0)],
)
def test_only_what_was_refused_or_counted_is_given_back(num_tokens: int, status: int, charged: int) -> None:
    bucket = Bucket(100, lambda: 0.0)
    admission = Admission(key=None, quota=Quota(requests=None, tokens=bucket), num_body_bytes=40)
    admission.reserve({"max_tokens": 40}, "chat", 1000)  # and 10 for the body
    assert bucket.level == 50
    admission.settle(num_tokens=num_tokens, status=status)
    assert bucket.level == 100 - charged


SIZES: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 2, "max_loras": 2, "wake_timeout_s": 1.0}
FACTS = SIZES | {"model_id": "org/tiny", "revision": None, "precision": "fp32", "engine": "transformers"}


@pytest.fixture
def ingress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ingress:
    """The ingress of one model with two adapters, as far as names go; no replica is behind it."""
    monkeypatch.setenv("KAJIYA_REGISTRY", str(tmp_path / "registry"))
    (tmp_path / "files").mkdir()
    for name in ("shop", "shop", "poet"):
        Registry.default().add(tmp_path / "files", plain_manifest(name))
    return ingress_of("tiny")


def ingress_of(*models: str) -> Ingress:
    made = Ingress.__new__(Ingress)
    made._model_cards = {name: {} for name in models}
    made._versions = Versions({name: ModelFacts(name=name, **FACTS) for name in models})
    return made


def call_with(*scopes: str) -> Call:
    key = KeyRecord(
        id="0" * 12,
        name="x",
        secret_sha256="",
        scopes=parse_scopes(scopes),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    call = Call(request_id="1", method="POST", path="/", client="")
    call.admission = Admission(key=key, quota=Quota(requests=None, tokens=None))
    return call


def outcome(ingress: Ingress, model: str | None, call: Call) -> str:
    """Return the exact name that is asked in the end, or what the client is told instead."""

    async def resolve() -> str:
        return await ingress._resolve(ingress._asked_for(model, call), call)

    try:
        return asyncio.run(resolve())
    except Refusal as refusal:
        return f"{refusal.status}: {refusal.message}"


def test_a_key_for_one_adapter_reaches_nothing_else(ingress: Ingress) -> None:
    call = call_with("adapters:tiny:shop")
    assert outcome(ingress, "tiny:shop", call) == "tiny:shop@2"
    assert outcome(ingress, "tiny:shop@1", call) == "tiny:shop@1"
    for model in ("tiny", None, "tiny:", "tiny:poet", "tiny:poet@1", "tiny:nobody", "Tiny:shop", "TINY", " tiny:shop"):
        assert outcome(ingress, model, call).startswith("403"), model
    for model in ("tiny:shop@", "tiny:shop@3", "tiny:shop@01", "tiny:shop@1@2", "tiny:shop@1:2", "tiny:shop:poet"):
        assert outcome(ingress, model, call)[:3] in ("403", "404") or model == "tiny:shop@", model


def test_a_key_for_one_version_does_not_follow_the_name(ingress: Ingress) -> None:
    call = call_with("adapters:tiny:shop@1")
    assert outcome(ingress, "tiny:shop@1", call) == "tiny:shop@1"
    assert outcome(ingress, "tiny:shop@2", call).startswith("403")
    assert outcome(ingress, "tiny:shop", call).startswith("403")  # it means version 2
    Registry.default().promote("tiny", "shop", 1)
    assert outcome(ingress, "tiny:shop", call) == "tiny:shop@1"


def test_the_only_model_is_meant_without_a_name_and_needs_its_scope_all_the_same(ingress: Ingress) -> None:
    assert outcome(ingress, None, call_with("models:tiny")) == "tiny"
    assert outcome(ingress, None, call_with("models:other")).startswith("403")
    assert outcome(ingress, "", call_with("models:tiny")).startswith("403")


def test_who_may_use_nothing_of_it_learns_no_name(ingress: Ingress) -> None:
    narrow = call_with("adapters:tiny:s*", "models:absent")
    told = [outcome(ingress, model, narrow) for model in ("tiny:poet", "tiny:pot", "tiny:sh", "absent", "other")]
    assert [text[:3] for text in told] == ["403", "403", "404", "404", "403"]
    assert not any("poet" in text for text in told[1:])
    assert "poet" in outcome(ingress, "tiny:sh", call_with())  # a key for everything is helped


def test_other_models_are_named_only_to_who_may_use_them() -> None:
    two = ingress_of("tiny", "large")
    assert outcome(two, None, call_with("models:tiny")) == "400: model is missing; served here: tiny."
    assert outcome(two, None, call_with()) == "400: model is missing; served here: large, tiny."
    assert "served: tiny." in outcome(two, "small", call_with("models:tiny", "models:small"))


def test_lists_hold_what_the_key_may_use(ingress: Ingress) -> None:
    def listed(*scopes: str) -> list[str]:
        admission = call_with(*scopes).admission
        assert admission is not None
        return [str(model["id"]) for model in ingress._list_models(admission)]

    assert listed() == ["tiny", "tiny:poet", "tiny:shop"]
    assert listed("models:tiny") == ["tiny"]
    assert listed("adapters:tiny:shop@1") == ["tiny:shop"]
    assert listed("models:other") == []


def test_a_request_that_passed_no_gate_is_refused(ingress: Ingress) -> None:
    assert outcome(ingress, "tiny", Call(request_id="1", method="POST", path="/", client="")).startswith("401")
