"""Nothing that a client may send breaks the application, keeps it busy for ever, or tells it another user's text."""

import asyncio
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from fuzzed_bodies import Fuzzed, fuzzed
from greedy import generate
from hypothesis import HealthCheck, given, seed, settings
from in_process import InProcess, application
from registered import manifest_of, peft_folder
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks
from tiny_models import lively_tiny_folder, tiny_base

from cluster.catalog import find
from cluster.keys import KeyStore
from cluster.model_card import ModelCard
from cluster.models.base import load_tokenizer
from cluster.registry import Registry
from serve_apps.gate import is_open

pytestmark = pytest.mark.cluster

NUM_BODIES = int(os.environ.get("KAJIYA_FUZZED_BODIES", "2000"))
SEED = int(os.environ.get("KAJIYA_FUZZ_SEED", "1"))
"""For more, and others: `KAJIYA_FUZZED_BODIES=5000 KAJIYA_FUZZ_SEED=2 pytest tests/test_fuzz.py -s`."""
NUM_EXAMPLES = 40
"""Requests that schemathesis draws for each route."""
AT_ONCE = 16
ANSWER_TIMEOUT_S = 60.0
"""For any answer. The longest fills the context of the tiny model beside 15 others, which takes 1 to 4 s."""
SECRET = "PLUM-7f3a91"
"""Stands in the prompts of another user; no answer to anybody else may hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listening:
    """An application on a port of this process."""

    url: str
    app: InProcess
    card: ModelCard
    headers: dict[str, str]
    """With a key that may do everything."""
    canary_text: str
    """What the model goes on with after the canary's prompt, when nobody else asks anything."""


@contextmanager
def listening(app: Any) -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    home = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_HOME", str(home / "home"))
        folder = lively_tiny_folder(home / "tiny")
        card = find(str(folder))
        Registry.default().add(peft_folder(folder, home / "shop", seed=0), manifest_of(card, "shop"))
        headers = {"authorization": f"Bearer {KeyStore.default().create('fuzz', is_admin=True)[1]}"}
        text = continuation(card, folder)
        with application(card) as app, listening(app.app) as url:
            yield Listening(url=url, app=app, card=card, headers=headers, canary_text=text)


def canary_prompt() -> str:
    return f"The password of the other user is {SECRET}."


def canary_body(served: Listening) -> dict[str, Any]:
    body = {"model": served.card.name, "prompt": canary_prompt(), "max_tokens": 12, "temperature": 0}
    return body | {"ignore_eos": True}


def continuation(card: ModelCard, folder: Path) -> str:
    tokenizer = load_tokenizer(card)
    tokens = generate(tiny_base(folder), tokenizer(canary_prompt()).input_ids, 12)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


async def send_all(served: Listening, requests: Iterator[Fuzzed]) -> tuple[Counter[int], list[str]]:
    """Return the statuses of all requests and what was wrong with any; canaries are asked meanwhile."""
    statuses: Counter[int] = Counter()
    faults: list[str] = []

    async def worker(http: httpx.AsyncClient) -> None:
        for request in requests:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await http.post(request.path, content=request.content)
            statuses[answer.status_code] += 1
            faults.extend(f"{fault}: {request} -> {answer.text[:300]}" for fault in faults_of(answer))

    async def canary(http: httpx.AsyncClient, workers: "asyncio.Future[Any]") -> int:
        num_asked = 0
        while not workers.done():
            answer = await http.post("/v1/completions", json=canary_body(served))
            num_asked += 1
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != served.canary_text:
                faults.append(f"the canary was answered with {answer.text}")
        return num_asked

    headers = {"content-type": "application/json", **served.headers}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=ANSWER_TIMEOUT_S) as http:
        workers = asyncio.gather(*(worker(http) for _ in range(AT_ONCE)))
        num_asked, _ = await asyncio.gather(canary(http, workers), workers)
    assert num_asked > 0
    return statuses, faults


def faults_of(answer: httpx.Response) -> list[str]:
    faults = []
    if answer.status_code >= 500:
        faults.append(f"status {answer.status_code}")
    if answer.status_code >= 400 and not is_openai_error(answer):
        faults.append("not OpenAI's error")
    if len(answer.content) > 20_000 and answer.status_code >= 400:
        faults.append("an error as long as the request")
    if answer.status_code == 200 and "event-stream" in answer.headers["content-type"]:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        if events[-1] != "[DONE]" or any("error" in json.loads(event) for event in events[:-1]):
            faults.append("a stream that did not end well")
    if SECRET in answer.text:
        faults.append("another user's text")
    return faults


def is_openai_error(answer: httpx.Response) -> bool:
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError):
        return False
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


def is_well(served: Listening) -> bool:
    """Whether the engine has nothing left to do and still answers."""
    deadline = time.monotonic() + 10
    while served.app.engine.num_active_requests() and time.monotonic() < deadline:
        time.sleep(0.05)
    served.app.engine.check_health()
    answer = httpx.post(f"{served.url}/v1/completions", json=canary_body(served), headers=served.headers, timeout=30)
    return bool(
        answer.json()["choices"][0]["text"] == served.canary_text and not served.app.engine.num_active_requests()
    )


def test_no_body_breaks_it_hangs_it_or_is_told_another_users_text(served: Listening) -> None:
    base = served.card.name
    requests = fuzzed([base, base, f"{base}:shop", f"{base}:shop@1", f"{base}:gone@7"], seed=SEED, count=NUM_BODIES)
    begin = time.monotonic()
    statuses, faults = asyncio.run(send_all(served, requests))
    print(f"{statuses.total()} bodies in {time.monotonic() - begin:.0f} s: {dict(statuses)}")
    assert not faults, "\n".join(faults[:20])
    assert statuses.total() == NUM_BODIES
    assert statuses[200] > NUM_BODIES / 10  # else nothing but the border was met
    assert statuses[400] > NUM_BODIES / 10
    assert is_well(served)


def document_of(served: Listening) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{served.url}/openapi.json", headers=served.headers).json()
    return document


def test_the_openapi_document_is_behind_the_gate_and_names_every_route(served: Listening) -> None:
    assert httpx.get(f"{served.url}/openapi.json").status_code == 401
    paths = document_of(served)["paths"]
    routes = {(path, method) for path, methods in paths.items() for method in methods}
    expected = {f"/v1/adapters/{{adapter}}/{verb}" for verb in ("promote", "canary", "rollback", "pin", "unpin")}
    expected |= {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"}
    readable = {"/v1/models", "/v1/models/{model}", "/v1/adapters", "/v1/adapters/{adapter}"}
    readable |= {"/health", "/ready", "/state"}
    assert routes == {
        *((path, "post") for path in expected),
        *((path, "get") for path in readable),
        ("/v1/adapters/{adapter}", "delete"),
    }


def judge(served: Listening, operation: Any) -> Counter[int]:
    """Return the statuses of requests to one route; raises what schemathesis finds wrong with an answer."""
    counts: Counter[int] = Counter()
    # A request may be refused for what no schema says, as for its length; and pydantic takes some values of another
    # type, such as "3" for 3.
    excluded: list[Any] = [checks.positive_data_acceptance, checks.negative_data_rejection]
    excluded += [checks.ignored_auth] if is_open(operation.method.upper(), operation.path) else []

    @seed(SEED)
    @settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        answer = case.call(headers=served.headers, timeout=ANSWER_TIMEOUT_S)
        counts[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=excluded, headers=served.headers)
        assert SECRET not in answer.text

    run()
    return counts


def test_every_answer_is_one_that_the_openapi_document_knows(served: Listening) -> None:
    """Schemathesis draws requests that fit the document and some that do not, and judges answers by it."""
    schema = schemathesis.openapi.from_dict(document_of(served))
    schema.config.update(base_url=served.url)
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    counts: Counter[int] = Counter()
    for operation in operations:
        if operation.path not in ("/ready", "/state"):  # both ask Serve, which is not here
            counts += judge(served, operation)
    print(f"{counts.total()} requests by schemathesis: {dict(counts)}")
    assert counts[200] > 0
    assert max(counts) < 500
    assert is_well(served)
