"""What the soak concludes from what it saw."""

import copy
from typing import Any

import httpx
import pytest

from benchmarks.soak import broken, growth, spread
from benchmarks.soak_clients import ending_after, has_text, refusal_of

RESULT: dict[str, Any] = {
    "endings": {"done": 500, "429": 7},
    "beyond_the_bound": {"429": 7},
    "streams_per_client": {"fewest": 1, "most": 3},
    "times_s": {"first": {"ratio": 1.5}, "total": {"ratio": 2.9}},
    "memory": {"ingress 1": {"ratio": 1.02}},
}


def test_a_run_within_its_bounds_breaks_none() -> None:
    assert broken(RESULT) == []


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("endings", "lost"), 1, "lost"),
        (("beyond_the_bound",), {"done": 3}, "turned away"),
        (("streams_per_client", "fewest"), 0, "no answer"),
        (("times_s", "first", "ratio"), 3.1, "first"),
        (("memory", "ingress 1", "ratio"), 1.11, "ingress 1 grew"),
    ],
)
def test_each_bound_is_named_when_it_is_broken(path: tuple[str, ...], value: Any, word: str) -> None:
    result = copy.deepcopy(RESULT)
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (found,) = broken(result)
    assert word in found


def test_growth_compares_the_last_third_with_the_first() -> None:
    # (100 + 200) / 2 = 150 and (300 + 600) / 2 = 450
    assert growth([100, 200, 1000, 0, 300, 600]) == {
        "first_bytes": 150,
        "last_bytes": 450,
        "ratio": 3,
        "max_bytes": 1000,
    }


def test_spread_is_the_99th_percentile_over_the_median() -> None:
    times = spread([float(i) for i in range(1, 100)])  # 99 values: the n-th percentile is the n-th of them
    assert (times["p50"], times["p99"], times["max"]) == (50, 99, 99)
    assert times["ratio"] == pytest.approx(99 / 50)


def test_a_stream_is_done_only_with_done_and_without_an_error() -> None:
    text = 'data: {"id":"x","choices":[{"delta":{"content":"a"}}]}'
    assert has_text(text)
    assert not has_text('data: {"id":"x","choices":[{"delta":{"role":"assistant","content":""}}]}')
    assert ending_after(text, "lost", "") == ("lost", "")
    assert ending_after("data: [DONE]", "lost", "") == ("done", "")
    error = 'data: {"error":{"message":"gone"}}'
    assert ending_after("data: [DONE]", *ending_after(error, "lost", "")) == ("error event", error)


def test_a_refusal_that_does_not_say_when_to_ask_again_is_none() -> None:
    body = {"error": {"message": "busy"}}
    assert refusal_of(httpx.Response(429, json=body, headers={"retry-after": "1"})) == "429"
    assert refusal_of(httpx.Response(503, json=body, headers={"retry-after": "1"})) == "503"
    assert refusal_of(httpx.Response(429, json=body)) == "lost"
    assert refusal_of(httpx.Response(500, json=body, headers={"retry-after": "1"})) == "lost"
