"""What a key may ask, how much of it, and how much at a time."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from gated import CHAT, REMOTE, Gated, error_of
from starlette.requests import ClientDisconnect

from cluster.scopes import parse_scopes
from serve_apps import gate


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    return Gated(tmp_path)


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


def test_an_open_playground_uses_up_no_requests(gated: Gated) -> None:
    token = gated.key(requests_per_minute=2, tokens_per_minute=10)
    polls = [gated.get(token, "/state") for _ in range(5)]
    assert [(answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) for answer in polls] == [
        (200, "2")
    ] * 5
    assert [gated.get(token).status_code for _ in range(3)] == [200, 200, 429]
    assert gated.get(token, "/state").status_code == 200
    assert gated.get("", "/state").status_code == 401


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
