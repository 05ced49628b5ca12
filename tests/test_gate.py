import asyncio
import hmac
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from gated import CHAT, REMOTE, Gated, error_of
from starlette.requests import ClientDisconnect

from cluster.scopes import parse_scopes
from serve_apps import gate
from serve_apps.keyring import REFRESH_S, STALE_S


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


def test_a_right_key_is_let_in_and_goes_no_further(gated: Gated) -> None:
    record, token = gated.store.create("ci")
    answer = gated.get(token)
    assert answer.status_code == 200
    assert "authorization" not in answer.json()
    assert gated.calls[0].key_id == record.id
    assert token[16:] not in repr(gated.calls)


def test_missing_unknown_wrong_and_revoked_keys_look_the_same(gated: Gated) -> None:
    record, token = gated.store.create("ci")
    _, wrong = gated.store.create("other")
    gated.store.revoke("other")
    half = f"kj-{record.id}-{wrong[16:]}"
    answers = [gated.get(t) for t in ("", "sk-something", f"kj-{'0' * 12}-{'a' * 43}", half, token[:-1], wrong)]
    assert {error_of(answer) for answer in answers} == {(401, "invalid_api_key")}
    assert len({answer.text for answer in answers}) == 1
    assert all(answer.headers["www-authenticate"] == "Bearer" for answer in answers)


def test_an_unknown_key_is_compared_too(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    gated.store.create("ci")
    compared: list[str] = []

    def spy(a: str, b: str) -> bool:
        compared.append(a)
        return False

    monkeypatch.setattr(hmac, "compare_digest", spy)
    gated.get(f"kj-{'0' * 12}-{'a' * 43}")
    gated.get()
    assert len(compared) == 2


def test_only_who_holds_an_expired_key_is_told_so(gated: Gated) -> None:
    record, token = gated.store.create("ci", expires_at=gated.now() + timedelta(seconds=10))
    gated.now_s += 9.9
    assert gated.get(token).status_code == 200
    gated.now_s += 0.1
    answer = gated.get(token)
    assert error_of(answer) == (401, "invalid_api_key")
    assert "expired at 2026-03-01 00:00:10 UTC" in answer.text
    assert "expired" not in gated.get(f"kj-{record.id}-{'a' * 43}").text


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", "  Bearer {}  "])
def test_forms_of_the_header_that_the_standard_allows(gated: Gated, form: str) -> None:
    _, token = gated.store.create("ci")
    assert gated.get(headers={"authorization": form.format(token)}).status_code == 200


@pytest.mark.parametrize(
    "form", ["{}", "Bearer{}", "Basic {}", "Bearer {} x", "Bearer {},{}", "Bearer\t{}", "Bearer", "Bearer Bearer {}"]
)
def test_forms_that_it_does_not(gated: Gated, form: str) -> None:
    _, token = gated.store.create("ci")
    assert error_of(gated.get(headers={"authorization": form.format(token, token)})) == (401, "invalid_api_key")


def test_two_headers_are_refused_even_if_one_is_right(gated: Gated) -> None:
    _, token = gated.store.create("ci")
    headers = [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {token}")]
    assert gated.run(lambda http: http.get("/v1/models", headers=headers)).status_code == 401


def test_a_key_in_the_query_counts_for_nothing(gated: Gated) -> None:
    _, token = gated.store.create("ci")
    assert gated.get(path=f"/v1/models?api_key={token}").status_code == 401


@pytest.mark.parametrize(
    "path", ["/state", "/openapi.json", "/nowhere", "/.//health", "/health/", "/HEALTH", "/v1/health"]
)
def test_whatever_is_not_named_as_open_needs_a_key(gated: Gated, path: str) -> None:
    gated.store.create("ci")
    assert error_of(gated.get(path=path)) == (401, "invalid_api_key")
    assert gated.get(path="/health").status_code == 200


def test_a_revocation_is_seen_within_the_bound(gated: Gated) -> None:
    _, token = gated.store.create("ci")

    async def both(http: httpx.AsyncClient) -> list[int]:
        http.headers["authorization"] = f"Bearer {token}"
        found = [(await http.get("/v1/models")).status_code]
        gated.store.revoke("ci")
        found.append((await http.get("/v1/models")).status_code)  # not read for each request
        gated.now_s += STALE_S
        found.append((await http.get("/v1/models")).status_code)
        return found

    assert gated.run(both) == [200, 200, 401]


def test_a_busy_server_reads_the_keys_while_it_answers(gated: Gated) -> None:
    _, token = gated.store.create("ci")

    async def busy(http: httpx.AsyncClient) -> bool:
        http.headers["authorization"] = f"Bearer {token}"
        assert (await http.get("/v1/models")).status_code == 200
        gated.store.revoke("ci")
        gated.now_s += REFRESH_S
        for _ in range(200):
            if (await http.get("/v1/models")).status_code == 401:
                return True
            await asyncio.sleep(0.01)
        return False

    assert gated.run(busy)


def test_without_keys_only_this_machine_is_answered(gated: Gated) -> None:
    assert gated.get(client=("127.0.0.1", 1)).status_code == 200
    assert gated.get(client=("::1", 1)).status_code == 200
    assert gated.get(client=("::ffff:127.0.0.1", 1)).status_code == 200
    for client in (REMOTE, ("10.0.0.1", 1), ("", 0), ("::ffff:10.0.0.1", 1), ("localhost", 1)):
        answer = gated.get(client=client)
        assert error_of(answer) == (401, "invalid_api_key")
        assert "kajiya keys create" in answer.text
        assert gated.get(path="/health", client=client).status_code == 200


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
def test_a_proxy_or_a_page_of_another_site_is_not_this_machine(gated: Gated, headers: dict[str, str]) -> None:
    assert gated.get(client=("127.0.0.1", 1), headers=headers).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "app.localhost"])
def test_names_of_this_machine(gated: Gated, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert gated.get(client=("127.0.0.1", 1), headers=headers).status_code == 200


def test_a_revoked_or_broken_key_does_not_open_the_server(gated: Gated) -> None:
    gated.store.create("ci")
    gated.store.revoke("ci")
    assert gated.get(client=("127.0.0.1", 1)).status_code == 401


def test_a_file_that_is_no_key_refuses_that_key_alone(gated: Gated) -> None:
    broken, lost = gated.store.create("broken")
    (gated.folder / f"{broken.id}.json").write_text("{")
    assert gated.get(client=("127.0.0.1", 1)).status_code == 401
    assert gated.get(lost).status_code == 401


def test_a_store_that_never_answered_lets_nobody_in(gated: Gated) -> None:
    (gated.folder).write_text("a file where a folder belongs")
    answer = gated.get(client=("127.0.0.1", 1))
    assert error_of(answer) == (503, "keys_unavailable")
    assert str(gated.folder) not in answer.text


def test_a_request_beyond_the_limit_is_told_when_to_come_back(gated: Gated) -> None:
    token = gated.key(requests_per_minute=2)
    other = gated.key("other", requests_per_minute=2)
    answers = [gated.get(token) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert error_of(answers[2]) == (429, "rate_limit_exceeded")
    assert answers[2].headers["retry-after"] == "30"
    assert gated.get(other).status_code == 200  # each key has its own
    gated.now_s += 30
    assert gated.get(token).status_code == 200


def test_a_limited_key_pays_for_its_tokens(gated: Gated) -> None:
    token = gated.key(tokens_per_minute=600)
    first = gated.chat(token, max_tokens=500, used=100)
    assert first.headers["x-ratelimit-remaining-tokens"] == "90"  # 41 bytes are taken for 10 tokens: 600 - 500 - 10
    assert left(gated, token) == 500  # 100 were used
    assert gated.chat(token, max_tokens=480, refused=True).status_code == 400
    assert left(gated, token) == 500  # what was refused costs nothing
    answer = gated.chat(token, max_tokens=480, n=2)  # 960 need a full bucket: 100 more at 10 a second
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
    assert left(gated, token) == 500


def test_whoever_leaves_a_stream_early_pays_what_was_reserved(gated: Gated) -> None:
    token = gated.key(tokens_per_minute=600)
    body = {"stream": True, "max_tokens": 400, "used": 5}
    assert gated.chat(token, **body).status_code == 200
    assert left(gated, token) == 595  # whoever stays pays what was used
    gated.now_s += 100
    request = httpx.Request("POST", CHAT, json={"use": ["m"], **body})
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": request.content}]
    num_sent = 0

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await asyncio.sleep(3600, {})

    async def send(message: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 3:  # the status and one event have arrived
            raise OSError("the client left")

    headers = [(b"authorization", f"Bearer {token}".encode())]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "client": REMOTE, "headers": headers}
    with pytest.raises((OSError, ClientDisconnect, ExceptionGroup)):
        asyncio.run(gated.app(scope, receive, send))
    assert left(gated, token) == 187  # 53 bytes are taken for 13 tokens: 600 - 400 - 13


def left(gated: Gated, token: str) -> int:
    """Return the tokens that the key may use now."""
    return int(gated.get(token).headers["x-ratelimit-remaining-tokens"])


def test_a_scope_is_not_escaped(gated: Gated) -> None:
    token = gated.key(scopes=parse_scopes(["models:n", "adapters:m:shop@2"]))
    assert gated.chat(token, use=["n"]).status_code == 200
    assert gated.chat(token, use=["m", "shop", 2]).status_code == 200
    for use in (
        ["m"],
        ["m", "shop", 1],
        ["m", "shop", 22],
        ["m", "Shop", 2],
        ["n", "shop", 2],
        ["N"],
        ["m", "poet", 2],
    ):
        assert error_of(gated.chat(token, use=use)) == (403, "insufficient_permissions")


def test_only_an_admin_key_changes_what_is_served(gated: Gated) -> None:
    assert (
        gated.run(lambda http: http.post("/v1/adapters"), ("127.0.0.1", 1)).status_code == 200
    )  # no keys: this machine
    plain, admin = gated.key("plain"), gated.key("admin", is_admin=True)

    def post(token: str) -> httpx.Response:
        answer: httpx.Response = gated.run(
            lambda http: http.post("/v1/adapters", headers={"authorization": f"Bearer {token}"})
        )
        return answer

    assert error_of(post(plain)) == (403, "insufficient_permissions")
    assert post(admin).status_code == 200


def test_requests_under_way_are_bounded_per_key_and_in_all(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_ONGOING", 5)
    monkeypatch.setattr(gate, "MAX_ONGOING_PER_KEY", 3)
    tokens = [gated.key("a"), gated.key("b")]

    async def crowd(http: httpx.AsyncClient) -> list[httpx.Response]:
        async def ask(token: str) -> httpx.Response:
            body = {"use": ["m"], "stream": True, "used": 1}
            return await http.post(CHAT, json=body, headers={"authorization": f"Bearer {token}"})

        await http.get("/v1/models", headers={"authorization": f"Bearer {tokens[0]}"})  # the keys are read
        return await asyncio.gather(*(ask(token) for token in tokens for _ in range(4)))

    answers = gated.run(crowd)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 200, 200, 429, 429]
    assert "This key" in answers[3].text
    assert "The server" in answers[6].text
    assert all(answer.headers.get("retry-after") == "1" for answer in answers if answer.status_code == 429)
    assert [answer.status_code for answer in gated.run(crowd)] == [
        200,
        200,
        200,
        429,
        200,
        200,
        429,
        429,
    ]  # all free again


def test_there_are_no_websockets_to_slip_in_by(gated: Gated) -> None:
    sent: list[Any] = []

    async def connect() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": b""}
        await gated.app(scope, receive, send)

    asyncio.run(connect())
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_behind_serves_haproxy_nobody_is_of_this_machine(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")  # it hides the client's address behind its own
    assert gated.get(client=("127.0.0.1", 1)).status_code == 401


def test_the_gate_costs_less_than_a_fifth_of_a_millisecond(gated: Gated) -> None:
    token = gated.key(requests_per_minute=10**6, tokens_per_minute=10**9)
    headers = {"authorization": f"Bearer {token}"}

    async def least_s(http: httpx.AsyncClient, path: str) -> float:
        times = []
        for _ in range(300):
            begin_s = time.perf_counter()
            await http.get(path, headers=headers)
            times.append(time.perf_counter() - begin_s)
        return min(times)  # others use the machine too

    async def both(http: httpx.AsyncClient) -> float:
        return await least_s(http, "/v1/models") - await least_s(http, "/health")

    assert gated.run(both) < 200e-6
