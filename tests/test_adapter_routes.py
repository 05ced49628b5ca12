import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from registered import plain_manifest

from cluster.keys import KeyStore
from cluster.registry import Registry
from cluster.scopes import Scopes
from serve_apps.call import call_of
from serve_apps.facts import ModelFacts
from serve_apps.http_app import make_app

FACTS = ModelFacts(
    name="tiny",
    model_id="org/tiny",
    revision=None,
    precision="fp32",
    engine="transformers",
    max_model_len=64,
    max_num_seqs=4,
    max_loras=2,
    wake_timeout_s=1,
)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """`shop` with versions 1 and 2, `poet` with version 1."""
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    registry = Registry.default()
    for name in ("shop", "shop", "poet"):
        registry.add(tmp_path / "adapter", plain_manifest(name))
    return registry


@pytest.fixture
def app(registry: Registry) -> FastAPI:
    app = make_app()
    app.state.facts = {"tiny": FACTS}

    @app.post("/answer/{version}")
    async def answer(version: int, request: Request) -> str:
        call = call_of(request)
        call.model, call.adapter, call.version = "tiny", "shop", version
        return "ok"

    return app


class Client:
    """Asks `app` in this process, as a program on the same machine would."""

    def __init__(self, app: FastAPI) -> None:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 4242))
        self._http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self._loop = asyncio.new_event_loop()
        self.key: str | None = None

    def __call__(self, method: str, path: str, body: Any = None, *, content: bytes | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        asked = self._http.request(method, path, json=body, content=content, headers=headers)
        return self._loop.run_until_complete(asked)

    def close(self) -> None:
        self._loop.run_until_complete(self._http.aclose())
        self._loop.close()


@pytest.fixture
def ask(app: FastAPI) -> Iterator[Client]:
    client = Client(app)
    yield client
    client.close()


def error(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return response.status_code, body["code"], body["message"]


def test_adapters_are_listed_with_what_their_names_mean(ask: Client) -> None:
    body = ask("GET", "/v1/adapters").json()
    assert body["object"] == "list"
    poet, shop = body["data"]
    assert poet["id"] == "tiny:poet"
    assert shop == {
        "id": "tiny:shop",
        "object": "adapter",
        "model": "tiny",
        "version": 2,
        "previous": [1],
        "canary": None,
        "pinned": False,
        "versions": [1, 2],
    }


def test_one_adapter_is_shown_with_its_manifest_and_what_each_version_answered(ask: Client) -> None:
    for version in (1, 2, 2):
        ask("POST", f"/answer/{version}")
    shown = ask("GET", "/v1/adapters/tiny:shop").json()
    assert shown["manifest"]["version"] == 2
    assert shown["max_loras"] == 2
    assert [(c["version"], c["num_requests"]) for c in shown["counts"]] == [(1, 1), (2, 2)]
    assert ask("GET", "/v1/adapters/tiny:shop@1").json()["manifest"]["version"] == 1


def test_a_life_over_http(ask: Client, registry: Registry) -> None:
    assert ask("POST", "/v1/adapters/tiny:shop@1/promote").json()["version"] == 1
    tried = ask("POST", "/v1/adapters/tiny:shop@2/canary", {"percent": 12.5}).json()
    assert (tried["version"], tried["canary"]) == (1, {"version": 2, "percent": 12.5})
    assert ask("POST", "/v1/adapters/tiny:shop/rollback").json()["canary"] is None
    assert ask("POST", "/v1/adapters/tiny:shop/rollback").json()["version"] == 2
    assert ask("POST", "/v1/adapters/tiny:shop/pin").json()["pinned"] is True
    assert ask("POST", "/v1/adapters/tiny:shop/unpin").json()["pinned"] is False
    assert ask("DELETE", "/v1/adapters/tiny:shop@1").json() == {
        "id": "tiny:shop@1",
        "object": "adapter",
        "deleted": True,
    }
    assert registry.versions("tiny", "shop") == (2,)
    assert ask("DELETE", "/v1/adapters/tiny:shop").status_code == 200
    assert registry.names("tiny") == ("poet",)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "words"),
    [
        ("GET", "tiny:nobody", None, 404, "model_not_found", "registered: poet, shop"),
        ("GET", "other:shop", None, 404, "model_not_found", "served here (tiny)"),
        ("GET", "tiny", None, 404, "model_not_found", "write MODEL:ADAPTER"),
        ("POST", "tiny:shop@9/promote", None, 404, "model_not_found", "there are shop@1, shop@2"),
        ("POST", "tiny:shop/promote", None, 400, None, "write MODEL:ADAPTER@VERSION"),
        ("POST", "tiny:shop@1/promote", {"require_eval": "x.jsonl"}, 400, None, "require_eval is not valid"),
        ("POST", "tiny:shop@2/canary", {"percent": 10}, 409, "adapter_conflict", "means version 2"),
        ("POST", "tiny:shop@1/canary", {"percent": 0}, 400, None, "percent"),
        ("POST", "tiny:shop@1/canary", {"percent": 10, "until": 1}, 400, None, "until"),
        ("POST", "tiny:poet/rollback", None, 404, "model_not_found", "nothing to roll back to"),
        ("POST", "tiny:poet@1/pin", None, 400, None, "the whole adapter, 'tiny:poet'"),
        ("DELETE", "tiny:shop@2", None, 409, "adapter_conflict", "promote another version first"),
        ("DELETE", "tiny:nobody", None, 404, "model_not_found", "no adapter 'nobody'"),
        ("PUT", "tiny:shop", None, 405, None, "Method Not Allowed"),
    ],
)
def test_what_cannot_be_done_is_said_in_openais_shape(
    ask: Client, method: str, path: str, body: Any, status: int, code: str, words: str
) -> None:
    said = error(ask(method, f"/v1/adapters/{path}", body))
    assert said[:2] == (status, code)
    assert words in said[2]


def test_a_body_without_its_content_type_is_told_the_header(ask: Client) -> None:
    status, _, message = error(ask("POST", "/v1/adapters/tiny:shop@1/canary", content=b'{"percent": 10}'))
    assert status == 400
    assert "Content-Type: application/json" in message


def test_more_pins_than_a_replica_can_spare_are_a_conflict(ask: Client) -> None:
    assert ask("POST", "/v1/adapters/tiny:shop/pin").status_code == 200
    status, code, message = error(ask("POST", "/v1/adapters/tiny:poet/pin"))
    assert (status, code) == (409, "adapter_conflict")
    assert "holds 2 adapters at a time" in message


CHANGES = [
    ("POST", "tiny:shop@1/promote", None),
    ("POST", "tiny:shop@1/canary", {"percent": 10}),
    ("POST", "tiny:shop/rollback", None),
    ("POST", "tiny:shop/pin", None),
    ("POST", "tiny:shop/unpin", None),
    ("DELETE", "tiny:shop@1", None),
]


def test_changes_take_an_admin_key_and_reading_any(ask: Client, registry: Registry) -> None:
    _, plain = KeyStore.default().create("plain")
    _, admin = KeyStore.default().create("admin", is_admin=True)
    assert ask("GET", "/v1/adapters").status_code == 401
    ask.key = plain
    assert ask("GET", "/v1/adapters").status_code == 200
    before = registry.alias("tiny", "shop")
    for method, path, body in CHANGES:
        assert error(ask(method, f"/v1/adapters/{path}", body))[:2] == (403, "insufficient_permissions")
    assert registry.alias("tiny", "shop") == before
    assert registry.versions("tiny", "shop") == (1, 2)
    ask.key = admin
    assert ask("POST", "/v1/adapters/tiny:shop@1/promote").status_code == 200


def test_a_key_is_told_of_the_adapters_that_it_may_use(ask: Client) -> None:
    _, ask.key = KeyStore.default().create("poets", scopes=Scopes(models=(), adapters=("tiny:poet",)))
    assert [one["id"] for one in ask("GET", "/v1/adapters").json()["data"]] == ["tiny:poet"]
    assert error(ask("GET", "/v1/adapters/tiny:shop"))[0] == 403
    assert "shop" not in error(ask("GET", "/v1/adapters/tiny:poet@7"))[2]


def test_a_thousand_adapters_are_listed(ask: Client, registry: Registry) -> None:
    home = Path(registry.resolve("tiny", "poet").uri).parent
    for i in range(1000):
        (home.parent / f"a{i}" / "v1").mkdir(parents=True)
        (home.parent / f"a{i}" / "v1" / "manifest.json").write_text("not read")
        (home.parent / f"a{i}" / "alias.json").write_text('{"version": 1}')
    begin_s = time.perf_counter()
    assert len(ask("GET", "/v1/adapters").json()["data"]) == 1002
    assert time.perf_counter() - begin_s < 2  # 0.2 s on an idle machine
