"""What is counted of a request and of a replica, without Ray; `test_observability` reads it at the port."""

from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest

from serve_apps import metrics, replica_metrics
from serve_apps.call import Call
from serve_apps.engine import Occupancy
from serve_apps.metrics import AdapterLabels, RequestMetrics
from serve_apps.replica_metrics import EngineMetrics, MeteredLoader

Recorded = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Name, value and tags of everything that is recorded, in order."""
    seen: Recorded = []

    class Instrument:
        def __init__(self, name: str, *about: Any) -> None:
            self._name, self._labels = name, set(about[-1])

        def record(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == self._labels  # Ray drops a point whose labels are not those declared
            seen.append((self._name, value, tags))

        inc = set = observe = record

    for module in (metrics, replica_metrics):
        for kind in ("Counter", "Gauge", "Histogram"):
            monkeypatch.setattr(module, kind, Instrument, raising=False)
    for cached in (replica_metrics._loads, replica_metrics._evictions, replica_metrics._load_seconds):
        monkeypatch.setattr(replica_metrics, cached.__name__, cached.__wrapped__)
    return seen


def call(**known: Any) -> Call:
    about = {"request_id": "r", "method": "POST", "path": "/v1/chat/completions", "client": "", "status": 200}
    return Call(**{**about, **known})


def test_a_stream_is_measured_from_its_arrival_to_its_last_token(recorded: Recorded) -> None:
    RequestMetrics().observe(
        call(
            model="m",
            adapter="shop",
            version=3,
            is_stream=True,
            num_prompt_tokens=7,
            num_completion_tokens=11,
            first_token_s=0.5,
            seconds=2.5,
        )
    )
    labels = {"model": "m", "adapter": "shop", "version": "3", "endpoint": "chat"}
    assert recorded == [
        ("kajiya_requests_total", 1, labels | {"status": "200"}),
        ("kajiya_prompt_tokens_total", 7, labels),
        ("kajiya_completion_tokens_total", 11, labels),
        ("kajiya_request_seconds", 2.5, labels),
        ("kajiya_time_to_first_token_seconds", 0.5, labels),
        ("kajiya_time_per_output_token_seconds", 0.2, labels),  # 2 s between 11 tokens
    ]


def test_an_answer_that_comes_whole_has_no_first_token(recorded: Recorded) -> None:
    RequestMetrics().observe(call(model="m", num_completion_tokens=5, first_token_s=2.0, seconds=2.0))
    assert {name for name, _, _ in recorded} == {
        *("kajiya_requests_total", "kajiya_completion_tokens_total", "kajiya_request_seconds")
    }


def test_a_refusal_is_counted_and_not_timed_and_a_probe_leaves_nothing(recorded: Recorded) -> None:
    requests = RequestMetrics()
    requests.observe(call(status=429, seconds=0.001))
    requests.observe(call(path="/state", method="GET"))
    requests.observe(call(path="/v1/nothing/" + "x" * 50, status=404))
    assert [(name, tags["status"], tags["model"]) for name, _, tags in recorded] == [
        ("kajiya_requests_total", "429", "")
    ]


def test_a_thousand_adapters_have_a_bounded_number_of_series() -> None:
    labels = AdapterLabels(max_labels=3)
    seen = Tally(tuple(labels.of(f"a{i % 1000}", 1).values()) for i in range(2000))
    assert seen == {("a0", "1"): 2, ("a1", "1"): 2, ("a2", "1"): 2, ("other", ""): 1994}
    assert labels.of(None, None) == {"adapter": "", "version": ""}


class Loader:
    """Refuses files that are named `broken`."""

    def load(self, slot: int, version: Any, folder: Path) -> None:  # noqa: ARG002
        if folder.name == "broken":
            raise ValueError("broken")


class Version:
    served_name = "m:shop@1"


def test_an_adapter_in_the_place_of_another_evicts_it(recorded: Recorded) -> None:
    loader = MeteredLoader(loader=Loader(), model="m")
    for slot, folder in ((0, "a"), (1, "b"), (0, "c")):
        loader.load(slot, Version(), Path(folder))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="broken"):
        loader.load(1, Version(), Path("broken"))  # type: ignore[arg-type]
    loader.load(1, Version(), Path("d"))  # type: ignore[arg-type] # the slot was empty by then
    names = Tally(name for name, _, _ in recorded)
    assert names["kajiya_adapter_loads_total"] == names["kajiya_adapter_load_seconds"] == 4
    assert names["kajiya_adapter_evictions_total"] == 2


def test_the_gauges_say_what_the_engine_says(recorded: Recorded) -> None:
    class Engine:
        def occupancy(self) -> Occupancy:
            return Occupancy(num_running=3, num_waiting=2, num_cached_tokens=96, max_cached_tokens=640)

    EngineMetrics(Engine(), "m").sample()  # type: ignore[arg-type]
    assert {name: value for name, value, _ in recorded} == {
        "kajiya_running_requests": 3,
        "kajiya_waiting_requests": 2,
        "kajiya_kv_cache_used_tokens": 96,
        "kajiya_kv_cache_tokens": 640,
    }
