"""Replicas that follow load on declared GPUs: real plans, options, ingress, autoscaler and placement, no model."""

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import pytest
import ray
from fake_engine import FakeServer
from ray import cloudpickle, serve
from ray.cluster_utils import Cluster
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.util.placement_group import placement_group_table

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import ServingPlan, plan_serving
from serve_apps.app import application
from serve_apps.args import ModelArgs
from serve_apps.facts import facts_of
from serve_apps.llm_configs import llm_config_of
from serve_apps.states import ModelState, model_states

pytestmark = pytest.mark.cluster

QUICK = {"upscale_delay_s": 0.5, "downscale_delay_s": 1.0, "look_back_period_s": 2.0, "metrics_interval_s": 0.2}
"""In place of tens of seconds and minutes; the rest of the configuration is what is derived from the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The address of the application, and the ids of the nodes by their kind of GPU."""

    url: str
    nodes: dict[str, str]


def plan_on(gpu: str, *, name: str, max_num_seqs: int = 4) -> ServingPlan:
    plan = plan_serving(find("smollm2-135m-instruct"), declared(gpu=gpu), max_num_seqs=max_num_seqs)
    assert 0 < plan.num_gpus < 0.5  # several share a card
    return replace(plan, card=replace(plan.card, name=name))


def split_over_four_t4s() -> ServingPlan:
    card = find("qwen2.5-14b-instruct")
    plan = plan_serving(card, declared(gpu="T4", num_gpus=4), engine="vllm", precision="fp16", max_num_seqs=4)
    assert plan.tensor_parallel_size == 4
    return replace(plan, card=replace(card, name="split"))


def models() -> list[tuple[ServingPlan, ModelArgs, float]]:
    """Plan, wish and the seconds that a replica takes to start. Few: each replica imports all of vLLM."""
    big = replace(plan_on("A100", name="big"), num_gpus=1.0)
    to_zero: dict[str, Any] = {"min_replicas": 0, "max_replicas": 1}
    return [
        (plan_on("A100", name="sleeper"), ModelArgs(model="sleeper", min_replicas=0, max_replicas=3), 0),
        (
            plan_on("A100", name="narrow", max_num_seqs=1),
            ModelArgs(model="narrow", max_queued_requests=2, num_replicas=1),
            0,
        ),
        (big, ModelArgs(model="big", wake_timeout_s=7, **to_zero), 0),
        (plan_on("T4", name="slow"), ModelArgs(model="slow", wake_timeout_s=2, **to_zero), 3),
        (split_over_four_t4s(), ModelArgs(model="split", **to_zero), 0),
    ]


def config_of(plan: ServingPlan, wish: ModelArgs, start_s: float) -> LLMConfig:
    config = llm_config_of(plan, wish)
    assert config.server_cls is not None
    options = config.server_cls.get_deployment_options(config)
    options["ray_actor_options"].pop("runtime_env", None)  # vLLM's own environment takes long to set up
    if "autoscaling_config" in options:
        options["autoscaling_config"] = options["autoscaling_config"] | QUICK
    changes = {"server_cls": FakeServer, "deployment_config": options, "experimental_configs": {"start_s": start_s}}
    return config.model_copy(update=changes)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def served(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(f"/tmp/kj{port}")  # sockets live in it, and their paths must be short
    # A `Cluster` announces itself to every `ray.init()` of the machine that shares this folder.
    monkeypatch_module.setenv("RAY_TMPDIR", str(folder))
    head = {"num_cpus": 16, "num_gpus": 1, "resources": {"accelerator_type:A100": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cloudpickle.register_pickle_by_value(fake_engine)  # the tests are not on the path of a replica
    try:
        cluster.add_node(num_cpus=16, num_gpus=5, resources={"accelerator_type:T4": 5})
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        configs = [config_of(*model) for model in models()]
        deployments = {config.model_id: build_llm_deployment(config) for config in configs}
        facts = {plan.card.name: facts_of(plan, wish) for plan, wish, _ in models()}
        serve.run(application(deployments, facts), name="kajiya")
        kinds = {
            kind.partition(":")[2]: node["NodeID"]
            for node in ray.nodes()
            for kind in node["Resources"]
            if kind.startswith("accelerator_type:")
        }
        yield Served(url=f"http://127.0.0.1:{port}", nodes=kinds)
    finally:
        cloudpickle.unregister_pickle_by_value(fake_engine)
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def state_of(model: str) -> ModelState:
    handle = serve.get_deployment_handle(f"FakeServer:{model}", "kajiya", _check_exists=False)
    facts = {plan.card.name: facts_of(plan, wish) for plan, wish, _ in models()}
    (state,) = asyncio.run(model_states({model: handle}, facts))
    return state


def ask(served: Served, model: str, seconds: float = 0) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": str(seconds)}]}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120)


def who(answer: httpx.Response) -> dict[str, str]:
    assert answer.status_code == 200, answer.text
    said: dict[str, str] = json.loads(answer.json()["choices"][0]["message"]["content"])
    return said


def wait_until(is_so: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_nothing_but_a_request_wakes_a_model(served: Served) -> None:
    # Ray 2.5x woke every model when its ingress started (ray#63065), or never began at zero (ray#59076).
    for path in ("/v1/models", "/v1/models/sleeper", "/health"):
        assert httpx.get(f"{served.url}{path}", timeout=30).status_code == 200
    time.sleep(3)
    for model in ("sleeper", "big", "slow", "split"):
        state = state_of(model)
        assert (state.num_running, state.num_starting, state.target_num_replicas) == (0, 0, 0)
        assert state.phase == "asleep"
    assert (state_of("narrow").num_running, state_of("narrow").phase) == (1, "running")


def test_the_ingress_is_on_the_head_and_holds_no_gpu_node(served: Served) -> None:
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    (ingress,) = details["applications"]["kajiya"]["deployments"]["Ingress"]["replicas"]
    assert ingress["node_id"] == served.nodes["A100"]  # the head of this cluster


async def load(served: Served, *, num_clients: int, until: Any, timeout_s: float) -> list[tuple[int, str]]:
    """Ask without pause, every other answer streamed, until `until()`; returns status and end of each answer."""
    results: list[tuple[int, str]] = []
    is_over = asyncio.Event()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        while not is_over.is_set():
            body = {"model": "sleeper", "messages": [{"role": "user", "content": "0.5"}], "stream": number % 2 == 0}
            answer = await http.post(f"{served.url}/v1/chat/completions", json=body)
            results.append((answer.status_code, answer.text[-16:].strip() if body["stream"] else "whole"))

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(num_clients)]
        try:
            async with asyncio.timeout(timeout_s):
                while not await asyncio.to_thread(until):
                    await asyncio.sleep(0.3)
        finally:
            is_over.set()
            await asyncio.gather(*clients)
    return results


def test_replicas_follow_load_from_zero_to_three_and_back_without_a_failed_request(served: Served) -> None:
    begin = time.monotonic()
    assert who(ask(served, "sleeper"))["node"] == served.nodes["A100"]  # 0 -> 1: the client waits, and is answered
    woken_s = time.monotonic() - begin

    # Twelve at a time are four replicas' worth at a target of three; the bound is three.
    results = asyncio.run(
        load(served, num_clients=12, until=lambda: state_of("sleeper").num_running == 3, timeout_s=90)
    )
    state = state_of("sleeper")
    assert (state.min_replicas, state.max_replicas, state.target_num_replicas) == (0, 3, 3)

    # A stream that lasts longer than the replicas stay must still end as it should.
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda seconds: ask(served, "sleeper", seconds), [5.0, 5.0, 5.0]))
    results += [(answer.status_code, "whole") for answer in answers]
    wait_until(lambda: state_of("sleeper").num_running + state_of("sleeper").num_stopping == 0, 60)
    assert state_of("sleeper").phase == "asleep"

    assert len(results) > 30
    assert set(results) == {(200, "whole"), (200, "data: [DONE]")}, results
    print(f"woken in {woken_s:.1f} s; {len(results)} requests, none failed")


def test_two_models_share_a_card_and_a_model_at_zero_wakes_again(served: Served) -> None:
    assert who(ask(served, "sleeper"))["node"] == who(ask(served, "narrow"))["node"] == served.nodes["A100"]
    state = state_of("sleeper")
    assert (state.num_gpus, state.accelerator_type) == (plan_on("A100", name="sleeper").num_gpus, "A100")


def test_a_model_that_is_split_gets_all_its_cards_together(served: Served) -> None:
    assert who(ask(served, "split"))["node"] == served.nodes["T4"]
    (group,) = (g for g in placement_group_table().values() if g["state"] == "CREATED" and len(g["bundles"]) == 4)
    assert all(bundle["GPU"] == 1 and "accelerator_type:T4" in bundle for bundle in group["bundles"].values())
    assert set(group["bundles_to_node_id"].values()) == {served.nodes["T4"]}
    assert state_of("split").num_gpus == 4


def test_a_model_that_has_no_place_is_refused_in_time_and_says_what_it_waits_for(served: Served) -> None:
    # A whole T4 is free, the one A100 is shared already.
    begin = time.monotonic()
    answer = ask(served, "big")
    assert 7 <= time.monotonic() - begin < 20
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert error_of(answer)["code"] == "model_not_ready"
    assert "waits for a node with 1 A100 free" in error_of(answer)["message"]
    assert state_of("big").phase == "waiting"


def test_a_wait_beyond_the_bound_is_a_503_while_the_model_goes_on_loading(served: Served) -> None:
    answer = ask(served, "slow")  # takes over 3 s to start, and its clients wait for 2
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "is being loaded" in error_of(answer)["message"]
    assert error_of(answer)["type"] == "server_error"
    wait_until(lambda: state_of("slow").num_running == 1, 60)
    assert who(ask(served, "slow", 3))["node"] == served.nodes["T4"]  # an answer may take longer than the wait
    assert state_of("slow").accelerator_type == "T4"


def test_more_than_may_wait_are_turned_away_at_once(served: Served) -> None:
    ask(served, "narrow")
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ask(served, "narrow", 1), range(10)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= 2  # at least what the replica takes
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert error_of(refused[0])["code"] == "rate_limit_exceeded"
