import asyncio
import hmac
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from gated import REMOTE, Gated, error_of

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
