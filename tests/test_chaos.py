"""What clients notice when parts of a running application are killed, an adapter is promoted, or others leave.

Requests in flight on a part that dies may fail once, in a way that says so; all others are answered, and so is every
request that is tried again.
"""

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from fuzzed_bodies import fuzzed
from in_process import InProcess, application
from killed_parts import NOTICED_S, answers, break_engine, check, kill, proxy_pid, replicas, report, wait_until
from ray import serve
from registered import manifest_of, peft_folder
from serving import free_port, serving
from streaming_load import Load, ending_of
from tiny_models import lively_tiny_folder

from cluster.catalog import find
from cluster.local_ray import SERVE_SETTINGS
from cluster.registry import Registry
from serve_apps.args import ModelArgs, ServeArgs
from serve_apps.door import DOOR
from serve_apps.sampling import Route

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODEL = "tiny"
NUM_TOKENS = 60
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me more."}],
    "temperature": 0,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
}


@dataclass(frozen=True)
class Doors:
    own: str
    proxy: str


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """The addresses of one model on two replicas, with an adapter of two versions."""
    home = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_HOME", str(home / "home"))
        for name, value in SERVE_SETTINGS.items():
            patch.setenv(name, value)
        folder = lively_tiny_folder(home / MODEL)
        for seed in (1, 2):
            version = peft_folder(folder, home / f"shop{seed}", seed=seed)
            Registry.default().add(version, manifest_of(find(str(folder)), "shop"), promote=seed == 1)
        model = ModelArgs(model=str(folder), num_replicas=2, max_num_seqs=16, max_model_len=256)
        args = ServeArgs(models=[model], port=free_port())
        with serving(args, through_proxy=True) as proxy:
            yield Doors(own=f"http://127.0.0.1:{args.port}", proxy=proxy)


@pytest.fixture(scope="module")
def url(doors: Doors) -> str:
    return doors.own


def test_a_killed_replica_fails_its_own_streams_once_and_says_so(url: str) -> None:
    server = f"TransformersServer:{MODEL}"
    before = replicas(server)
    assert len(before) == 2
    with Load(url=url, body={"model": MODEL, **CHAT}) as load:
        load.wait_done(16)
        killed_s = kill(load, next(iter(before.values())))
        load.wait_done(32)
        back_s = wait_until(lambda: len(replicas(server)) == 2 and replicas(server) != before)
        load.wait_done(32)
    report("a replica is killed", load, back_s=round(back_s, 1))
    check(load, killed_s=killed_s, allowed={"503", "error event"})
    assert len(replicas(server)) == 2


def test_a_replica_whose_engine_dies_is_soon_sent_nothing_more(url: str) -> None:
    server = f"TransformersServer:{MODEL}"
    before = replicas(server)
    with Load(url=url, body={"model": MODEL, **CHAT}) as load:
        load.wait_done(16)
        wait_until(lambda: load.num_open >= load.num_clients // 2)
        break_engine(server)
        killed_s = time.monotonic()
        back_s = wait_until(lambda: len(replicas(server)) == 2 and replicas(server) != before)
        load.wait_done(32)
    report("the engine of a replica dies", load, back_s=round(back_s, 1))
    failed = [one for one in load.tries if one.ending != "done"]
    assert failed
    assert {one.ending for one in failed} <= {"503", "error event"}
    # Until the process is gone it refuses faster than the other one answers, so some are sent to it again.
    assert all(one.begin_s < killed_s + 2 * NOTICED_S for one in failed)
    assert load.num_given_up == 0


def test_a_killed_ingress_fails_what_is_under_way_and_no_request_after(url: str) -> None:
    before = replicas("Ingress")
    with Load(url=url, body={"model": MODEL, **CHAT}) as load:
        load.wait_done(16)
        killed_s = kill(load, *before.values())
        back_s = wait_until(lambda: bool(replicas("Ingress")) and replicas("Ingress") != before)
        load.wait_done(32)
    report("the ingress is killed", load, back_s=round(back_s, 1))
    # Nobody is left who could end a stream with an error. Whoever comes later waits at the socket, which stays open.
    check(load, killed_s=killed_s, allowed={"broken"})


def test_a_killed_door_is_not_noticed_and_made_anew_with_the_next_ingress(url: str) -> None:
    door = ray.get_actor(DOOR, namespace=DOOR)
    with Load(url=url, body={"model": MODEL, **CHAT}) as load:
        load.wait_done(16)
        ray.kill(door)
        load.wait_done(32)
    report("the door is killed", load)
    assert set(load.endings) == {"done"}
    # With both of them gone nobody holds the socket; the next ingress makes a new door.
    before = replicas("Ingress")
    os.kill(next(iter(before.values())), signal.SIGKILL)
    wait_until(lambda: bool(replicas("Ingress")) and replicas("Ingress") != before)
    wait_until(lambda: answers(f"{url}/health"))
    assert ray.get_actor(DOOR, namespace=DOOR) != door


def test_a_killed_proxy_shuts_its_port_for_some_seconds_and_loses_no_request_that_is_tried_again(doors: Doors) -> None:
    with Load(url=doors.proxy, body={"model": MODEL, **CHAT}) as load:
        load.wait_done(16)
        killed_s = kill(load, proxy_pid())
        load.wait_done(48)
    back_s = min(one.begin_s for one in load.tries if one.begin_s > killed_s and one.ending == "done") - killed_s
    report("the proxy is killed", load, back_s=round(back_s, 1))
    failed = [one for one in load.tries if one.ending != "done"]
    # A proxy opens its port a moment before the controller tells it the routes (`ray/serve/_private/proxy.py`).
    assert {one.ending for one in failed} <= {"broken", "unreachable", "proxy's 404"}
    assert load.endings["proxy's 404"] <= 2 * load.num_clients
    assert 0 < load.endings["broken"] <= load.num_clients
    assert all(one.begin_s < killed_s + NOTICED_S for one in failed if one.ending == "broken")
    assert load.num_given_up == 0
    assert len(load.num_tries_of_failed) == load.num_clients
    assert back_s < 30  # what Serve takes with its own period of checks


def test_a_promotion_in_mid_stream_fails_nobody(url: str) -> None:
    with Load(url=url, body={"model": f"{MODEL}:shop", **CHAT}) as load:
        load.wait_done(16)
        wait_until(lambda: load.num_open >= load.num_clients // 2)
        promoted = httpx.post(f"{url}/v1/adapters/{MODEL}:shop@2/promote", timeout=30)
        assert promoted.json()["version"] == 2
        promoted_s = time.monotonic()
        load.wait_done(48)
    report("a promotion", load, versions=dict(Counter(one.version for one in load.tries)))
    assert set(load.endings) == {"done"}
    after = [one.version for one in load.tries if one.begin_s > promoted_s]
    assert len(after) > load.num_clients
    assert set(after) == {"shop@2"}
    crossing = [one for one in load.tries if one.begin_s < promoted_s < one.end_s]
    assert {one.version for one in crossing} == {"shop@1"}


def test_clients_that_leave_give_their_places_back(url: str) -> None:
    async def leave(http: httpx.AsyncClient) -> None:
        body = {"model": MODEL, **CHAT, "max_tokens": 200, "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                return

    async def leave_all() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            for _ in range(4):
                await asyncio.gather(*(leave(http) for _ in range(12)))

    with Load(url=url, body={"model": MODEL, **CHAT}, num_clients=8) as load:
        load.wait_done(8)
        asyncio.run(leave_all())
        load.wait_done(16)
    report("48 clients leave", load)
    assert set(load.endings) == {"done"}
    handle = serve.get_deployment_handle(f"TransformersServer:{MODEL}", "kajiya")
    # A call goes to either replica.
    wait_until(lambda: all(handle.num_active_requests.remote().result() == 0 for _ in range(8)), 20)


def test_spoiled_bodies_are_refused_on_their_way_through_the_cluster_too(url: str) -> None:
    # From the ingress to a replica a body is pickled, which the tests in one process leave out.
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}, timeout=60) as http:
        bodies = fuzzed([MODEL, f"{MODEL}:shop"], seed=3, count=300)
        statuses = Counter(http.post(body.path, content=body.content).status_code for body in bodies)
        readable = {path: http.get(path).status_code for path in ("/openapi.json", "/state", "/ready", "/health")}
    print(f"\n{statuses.total()} spoiled bodies: {dict(statuses)}")
    assert set(statuses) <= {200, 400, 404}
    assert statuses[200] > 30
    assert set(readable.values()) == {200}


def test_a_dying_engine_tells_everybody_in_its_batch_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    card = find(str(lively_tiny_folder(tmp_path / MODEL)))
    body = {"model": card.name, "prompt": "a", "max_tokens": 200, "temperature": 1, "ignore_eos": True}
    calls, choose = itertools.count(), Route.choose

    def fail_in_the_middle(*arguments: Any) -> int:
        if next(calls) > 300:  # of 5 answers x 200 tokens
            raise ZeroDivisionError
        return choose(*arguments)

    monkeypatch.setattr(Route, "choose", fail_in_the_middle)

    async def run(app: InProcess) -> list[httpx.Response]:
        async with app.client() as http:
            fields: list[dict[str, Any]] = [{}, {"stop": "never"}, {"n": 2}, {"stream": True}]
            asked = [asyncio.create_task(http.post("/v1/completions", json=body | more)) for more in fields]
            text = {"model": card.name, "input": ["a" * 200] * 20}
            embedded = await asyncio.gather(*(http.post("/v1/embeddings", json=text) for _ in range(60)))
            # Those that waited for a pause between two passes; the first ones got it.
            assert {200, 503} >= {answer.status_code for answer in embedded} >= {503}
            answers = await asyncio.gather(*asked)
            return [*answers, await http.post("/v1/completions", json=body)]

    with application(card) as app:
        *whole, streamed, after = asyncio.run(run(app))
    for answer in (*whole, after):
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "engine_failed"
        assert int(answer.headers["retry-after"]) > 0
    assert streamed.status_code == 200
    assert ending_of(streamed.text.splitlines())[0] == "error event"
