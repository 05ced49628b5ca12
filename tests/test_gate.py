import asyncio
import hmac
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from cluster.keys import KeyStore
from serve_apps.call import Call, CallMiddleware, call_of
from serve_apps.gate import Gate, admission_of, require_admin
from serve_apps.http_app import refusal_response
from serve_apps.keyring import REFRESH_S, STALE_S, Keyring
from serve_apps.refusals import Refusal

REMOTE = ("203.0.113.7", 40000)


class Clock:
    """Seconds and dates that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def now(self) -> datetime:
        return datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=self.now_s - 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def app(store: KeyStore, clock: Clock, calls: list[Call]) -> FastAPI:
    """The real middlewares around routes that say what came through."""
    app = FastAPI()
    app.add_middleware(Gate, refuse=refusal_response, keyring=Keyring(store, clock), clock=clock, now=clock.now)
    app.add_middleware(CallMiddleware, observers=[calls.append])
    app.add_exception_handler(Refusal, lambda _, error: refusal_response(error))

    @app.get("/health")
    @app.get("/v1/models")
    async def get(request: Request) -> dict[str, Any]:
        return {"headers": dict(request.headers)}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        call, body = call_of(request), await request.json()
        admission = admission_of(call)
        admission.check(*body["use"])
        admission.reserve(body, "chat", 1000)
        if "used" in body:
            call.num_completion_tokens = body["used"]
        if body.get("status"):
            raise Refusal("No.", status=body["status"])
        return JSONResponse({"key": call.key_id, "bytes": admission.num_body_bytes})

    @app.post("/v1/adapters")
    async def adapters(request: Request) -> dict[str, Any]:
        require_admin(call_of(request))
        return {}

    return app


def send(app: FastAPI, ask: Callable[[httpx.AsyncClient], Awaitable[Any]], client: tuple[str, int] = REMOTE) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
            return await ask(http)

    return asyncio.run(run())


def get(app: FastAPI, token: str = "", path: str = "/v1/models", **options: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    client = options.pop("client", REMOTE)
    headers |= options.pop("headers", {})
    answer: httpx.Response = send(app, lambda http: http.get(path, headers=headers), client)
    return answer


def chat(app: FastAPI, token: str, use: tuple[Any, ...] = ("m",), **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"}
    body = {"use": use, **body}
    answer: httpx.Response = send(app, lambda http: http.post("/v1/chat/completions", json=body, headers=headers))
    return answer


def error_of(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def test_a_right_key_is_let_in_and_goes_no_further(app: FastAPI, store: KeyStore, calls: list[Call]) -> None:
    record, token = store.create("ci")
    answer = get(app, token)
    assert answer.status_code == 200
    assert "authorization" not in answer.json()["headers"]
    assert calls[0].key_id == record.id
    assert token[16:] not in repr(calls)


def test_missing_unknown_wrong_and_revoked_keys_look_the_same(app: FastAPI, store: KeyStore, clock: Clock) -> None:
    record, token = store.create("ci")
    _, wrong = store.create("other")
    store.revoke("other")
    half = f"kj-{record.id}-{wrong[16:]}"
    answers = [get(app, t) for t in ("", "sk-something", f"kj-{'0' * 12}-{'a' * 43}", half, token[:-1], wrong)]
    assert {error_of(answer) for answer in answers} == {(401, "invalid_api_key")}
    assert len({answer.text for answer in answers}) == 1
    assert all(answer.headers["www-authenticate"] == "Bearer" for answer in answers)


def test_an_unknown_key_is_compared_too(app: FastAPI, store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("ci")
    compared: list[str] = []

    def spy(a: str, b: str) -> bool:
        compared.append(a)
        return False

    monkeypatch.setattr(hmac, "compare_digest", spy)
    get(app, f"kj-{'0' * 12}-{'a' * 43}")
    get(app)
    assert len(compared) == 2


def test_only_who_holds_an_expired_key_is_told_so(app: FastAPI, store: KeyStore, clock: Clock) -> None:
    record, token = store.create("ci", expires_at=clock.now() + timedelta(seconds=10))
    clock.now_s += 9.9
    assert get(app, token).status_code == 200
    clock.now_s += 0.1
    answer = get(app, token)
    assert error_of(answer) == (401, "invalid_api_key")
    assert "expired at 2026-03-01 00:00:10 UTC" in answer.text
    assert "expired" not in get(app, f"kj-{record.id}-{'a' * 43}").text


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", "  Bearer {}  "])
def test_forms_of_the_header_that_the_standard_allows(app: FastAPI, store: KeyStore, form: str) -> None:
    _, token = store.create("ci")
    assert get(app, headers={"authorization": form.format(token)}).status_code == 200


@pytest.mark.parametrize(
    "form", ["{}", "Bearer{}", "Basic {}", "Bearer {} x", "Bearer {},{}", "Bearer\t{}", "Bearer", "Bearer Bearer {}"]
)
def test_forms_that_it_does_not(app: FastAPI, store: KeyStore, form: str) -> None:
    _, token = store.create("ci")
    assert error_of(get(app, headers={"authorization": form.format(token, token)})) == (401, "invalid_api_key")


def test_two_headers_are_refused_even_if_one_is_right(app: FastAPI, store: KeyStore) -> None:
    _, token = store.create("ci")
    headers = [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {token}")]
    assert send(app, lambda http: http.get("/v1/models", headers=headers)).status_code == 401


def test_a_key_in_the_query_counts_for_nothing(app: FastAPI, store: KeyStore) -> None:
    _, token = store.create("ci")
    assert get(app, path=f"/v1/models?api_key={token}").status_code == 401


@pytest.mark.parametrize(
    "path", ["/state", "/openapi.json", "/nowhere", "/.//health", "/health/", "/HEALTH", "/v1/health"]
)
def test_whatever_is_not_named_as_open_needs_a_key(app: FastAPI, store: KeyStore, path: str) -> None:
    store.create("ci")
    assert error_of(get(app, path=path)) == (401, "invalid_api_key")
    assert get(app, path="/health").status_code == 200


def test_a_revocation_is_seen_within_the_bound(app: FastAPI, store: KeyStore, clock: Clock) -> None:
    _, token = store.create("ci")

    async def both(http: httpx.AsyncClient) -> list[int]:
        http.headers["authorization"] = f"Bearer {token}"
        found = [(await http.get("/v1/models")).status_code]
        store.revoke("ci")
        found.append((await http.get("/v1/models")).status_code)  # not read for each request
        clock.now_s += STALE_S
        found.append((await http.get("/v1/models")).status_code)
        return found

    assert send(app, both) == [200, 200, 401]


def test_a_busy_server_reads_the_keys_while_it_answers(app: FastAPI, store: KeyStore, clock: Clock) -> None:
    _, token = store.create("ci")

    async def busy(http: httpx.AsyncClient) -> bool:
        http.headers["authorization"] = f"Bearer {token}"
        assert (await http.get("/v1/models")).status_code == 200
        store.revoke("ci")
        clock.now_s += REFRESH_S
        for _ in range(200):
            if (await http.get("/v1/models")).status_code == 401:
                return True
            await asyncio.sleep(0.01)
        return False

    assert send(app, busy)


def test_without_keys_only_this_machine_is_answered(app: FastAPI) -> None:
    assert get(app, client=("127.0.0.1", 1)).status_code == 200
    assert get(app, client=("::1", 1)).status_code == 200
    assert get(app, client=("::ffff:127.0.0.1", 1)).status_code == 200
    for client in (REMOTE, ("10.0.0.1", 1), ("", 0), ("::ffff:10.0.0.1", 1), ("localhost", 1)):
        answer = get(app, client=client)
        assert error_of(answer) == (401, "invalid_api_key")
        assert "kajiya keys create" in answer.text
        assert get(app, path="/health", client=client).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"via": "1.1 proxy"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost@evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "["},
    ],
)
def test_a_proxy_or_a_page_of_another_site_is_not_this_machine(app: FastAPI, headers: dict[str, str]) -> None:
    assert get(app, client=("127.0.0.1", 1), headers=headers).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "app.localhost"])
def test_names_of_this_machine(app: FastAPI, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert get(app, client=("127.0.0.1", 1), headers=headers).status_code == 200


def test_a_revoked_or_broken_key_does_not_open_the_server(app: FastAPI, store: KeyStore, tmp_path: Path) -> None:
    store.create("ci")
    store.revoke("ci")
    assert get(app, client=("127.0.0.1", 1)).status_code == 401


def test_a_file_that_is_no_key_refuses_that_key_alone(app: FastAPI, store: KeyStore, tmp_path: Path) -> None:
    broken, lost = store.create("broken")
    (tmp_path / "keys" / f"{broken.id}.json").write_text("{")
    assert get(app, client=("127.0.0.1", 1)).status_code == 401
    assert get(app, lost).status_code == 401


def test_a_store_that_never_answered_lets_nobody_in(app: FastAPI, store: KeyStore, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a file where a folder belongs")
    answer = get(app, client=("127.0.0.1", 1))
    assert error_of(answer) == (503, "keys_unavailable")
    assert str(tmp_path) not in answer.text
