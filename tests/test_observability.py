"""What operators see of a running application: metrics at Ray's export port, logs, probes."""

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from registered import manifest_of, peft_folder
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.registry import Registry
from serve_apps.app import build
from serve_apps.args import ModelArgs, ServeArgs

pytestmark = pytest.mark.cluster

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana_dashboard.json"
TIMEOUT_S = 60.0
REQUEST_ID = "from-the-client-1"
CACHE = "ray_kajiya_kv_cache_tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """An application after some requests."""

    url: str
    metrics_url: str
    logs: Path
    model: str

    def metrics(self) -> dict[str, float]:
        """Sums over all series of the same name."""
        sums: dict[str, float] = {}
        for line in httpx.get(self.metrics_url, timeout=30).text.splitlines():
            if match := re.fullmatch(r"(ray_kajiya_\w+)\{.*\} (\S+)", line):
                sums[match[1]] = sums.get(match[1], 0) + float(match[2])
        return sums


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")
    asleep = tiny_llama_folder(tmp_path_factory.mktemp("models") / "asleep")
    card = find(str(folder))
    port, metrics_port = _free_port(), _free_port()
    state = Path(f"/tmp/kj{port}")  # sockets live in it, and their paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(tmp_path_factory.mktemp("registry")))
        for seed, name in enumerate(("shop", "poet")):
            adapter = peft_folder(folder, tmp_path_factory.mktemp(name), seed=seed)
            Registry.default().add(adapter, manifest_of(card, name))
        ray.init(
            num_cpus=2, include_dashboard=False, _temp_dir=str(state), log_to_driver=False,
            _metrics_export_port=metrics_port, _system_config={"metrics_report_interval_ms": 1000},
        )  # fmt: skip
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            wishes: list[str | ModelArgs] = [
                ModelArgs(model=str(folder), max_num_seqs=4, max_model_len=256, num_adapters=1),
                ModelArgs(model=str(asleep), max_model_len=256, min_replicas=0, max_replicas=1),
            ]
            serve.run(build(ServeArgs(models=wishes)), name="kajiya")
            url = f"http://127.0.0.1:{port}"
            _wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
            _ask_some(url, card.name)
            logs = state / "session_latest" / "logs" / "serve"
            yield Observed(url=url, metrics_url=f"http://127.0.0.1:{metrics_port}", logs=logs, model=card.name)
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(state, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until(is_so: Callable[[], bool], what_there_is: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, what_there_is()
        time.sleep(0.5)


def _ask_some(url: str, model: str) -> None:
    """Three streams, whose adapters take turns in one slot, an answer that comes whole, and a refusal."""
    body = {"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "ignore_eos": True}
    for name in ("shop", "poet", "shop"):
        answer = _post(url, body | {"model": f"{model}:{name}", "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
    assert _post(url, body, **{"x-request-id": REQUEST_ID}).headers["x-request-id"] == REQUEST_ID
    assert _post(url, body | {"temperature": 9}).status_code == 400


def _post(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_metrics_at_the_export_port_count_what_happened(observed: Observed) -> None:
    # Ingress and replica report each on its own; the first gauges are of an engine that has no cache yet.
    counts = {
        "ray_kajiya_requests_total": 5,
        "ray_kajiya_completion_tokens_total": 4 * 8,
        "ray_kajiya_time_to_first_token_seconds_count": 3,
        "ray_kajiya_time_per_output_token_seconds_count": 3,
        "ray_kajiya_request_seconds_count": 4,
        "ray_kajiya_adapter_loads_total": 3,
        "ray_kajiya_adapter_evictions_total": 2,
        "ray_kajiya_running_requests": 0,
    }
    _wait_until(lambda: observed.metrics().get(CACHE, 0) >= 4 * 256)
    _wait_until(lambda: counts.items() <= observed.metrics().items(), observed.metrics)
    text = httpx.get(observed.metrics_url, timeout=30).text
    for labels in ('adapter="shop"', 'status="400"', 'endpoint="chat"', 'version="1"', f'model="{observed.model}"'):
        assert re.search(rf"ray_kajiya_requests_total\{{.*{re.escape(labels)}", text)


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_on_it(observed: Observed) -> None:
    named = set(re.findall(r"ray_kajiya_\w+", DASHBOARD.read_text()))
    assert len(named) > 10
    _wait_until(lambda: named <= set(observed.metrics()))
    kinds = "_(?:bucket|count|sum|created)$"
    assert {re.sub(kinds, "", n) for n in observed.metrics()} == {re.sub(kinds, "", n) for n in named}


def test_ingress_and_replica_log_json_with_the_clients_request_id(observed: Observed) -> None:
    def lines() -> dict[str, list[dict[str, Any]]]:
        read = {file: file.read_text().splitlines() for file in observed.logs.glob("replica_*.log")}
        events = {file.name: [json.loads(line) for line in text] for file, text in read.items()}
        return {name: [e for e in all_ if e.get("request_id") == REQUEST_ID] for name, all_ in events.items()}

    _wait_until(lambda: sum(map(bool, lines().values())) == 2)
    ours = [event for events in lines().values() for event in events]
    deployments = {event["deployment"].removeprefix("kajiya_").partition(":")[0] for event in ours}
    assert deployments == {"Ingress", "TransformersServer"}
    loads = [line for file in observed.logs.glob("replica_*.log") for line in file.read_text().splitlines()]
    loaded = [event for event in map(json.loads, loads) if "adapter" in event]
    assert [event["adapter"].rpartition(":")[2] for event in loaded] == ["shop@1", "poet@1", "shop@1"]
    assert all(event["request_id"] for event in loaded)


def test_the_page_and_the_probes_wake_no_model(observed: Observed) -> None:
    page = httpx.get(f"{observed.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for _ in range(4):
        assert httpx.get(f"{observed.url}/health").json() == {"status": "ok"}
        ready = httpx.get(f"{observed.url}/ready").json()
        assert ready["num_models"] == {"ready": 1, "at zero, wakes on request": 1}
        state = {m["model"]: m for m in httpx.get(f"{observed.url}/state").json()["models"]}
        assert (state[observed.model]["num_running"], state[observed.model]["phase"]) == (1, "running")
        assert (state["asleep"]["target_num_replicas"], state["asleep"]["phase"]) == (0, "asleep")
        time.sleep(1)
