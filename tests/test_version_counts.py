import pytest

from serve_apps.call import Call
from serve_apps.version_counts import SAMPLE_SIZE, Sample, VersionCounts


def call(version: int | None = 1, *, status: int = 200, **fields: object) -> Call:
    made = Call(request_id="r", method="POST", path="/", client="c", model="tiny", adapter="shop", version=version)
    made.status, made.seconds = status, 2.0
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_each_version_has_its_own_counts() -> None:
    counts = VersionCounts()
    for _ in range(3):
        counts.observe(call(1, num_prompt_tokens=5, num_completion_tokens=7))
    counts.observe(call(2, num_prompt_tokens=1, num_completion_tokens=2))
    counts.observe(call(2, status=503))
    counts.observe(call(None, adapter=None))
    first, second = counts.of("tiny", "shop")
    assert (first["version"], first["num_requests"], first["num_errors"]) == (1, 3, 0)
    assert (first["num_prompt_tokens"], first["num_completion_tokens"]) == (15, 21)
    assert (second["version"], second["num_requests"], second["num_errors"]) == (2, 2, 1)
    (base,) = counts.of("tiny", None)
    assert base["num_requests"] == 1
    assert counts.of("tiny", "poet") == []


def test_times_of_a_stream_are_those_to_the_first_token_and_between_the_others() -> None:
    counts = VersionCounts()
    # 2 s in all, 0.5 s to the first of 7 tokens: 1.5 s for the other 6
    counts.observe(call(is_stream=True, first_token_s=0.5, num_completion_tokens=7))
    counts.observe(call(is_stream=True, first_token_s=0.5, num_completion_tokens=1))
    counts.observe(call(first_token_s=2.0, num_completion_tokens=7))  # a whole answer has no first token
    (tally,) = counts.of("tiny", "shop")
    assert tally["first_token_s"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert tally["token_s"] == {"p50": 0.25, "p90": 0.25, "p99": 0.25}
    assert tally["seconds"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}


def test_errors_do_not_look_like_fast_answers() -> None:
    counts = VersionCounts()
    counts.observe(call(status=400, seconds=0.001))
    assert counts.of("tiny", "shop")[0]["seconds"] is None


def test_what_reached_no_model_is_not_counted() -> None:
    counts = VersionCounts()
    counts.observe(call(model=None))
    counts.observe(call(None, adapter=None, status=404, error_code="model_not_found"))
    assert counts.of("tiny", None) == []


def test_percentiles_by_hand() -> None:
    sample = Sample()
    for value in range(1, 101):
        sample.add(value)
    assert sample.percentiles() == {"p50": 50, "p90": 90, "p99": 99}


def test_a_sample_is_bounded_and_takes_late_values_as_well_as_early_ones() -> None:
    sample = Sample()
    num_values = 40 * SAMPLE_SIZE
    for value in range(num_values):
        sample.add(value)
    assert len(sample._values) == SAMPLE_SIZE
    found = sample.percentiles()
    assert found is not None
    # the median of 256 uniform draws is off by 1 / (2 sqrt(256)) = 0.031; five of them
    assert found["p50"] / num_values == pytest.approx(0.5, abs=0.16)


def test_the_number_of_versions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.version_counts.MAX_VERSIONS", 20)
    counts = VersionCounts()
    for version in range(30):
        counts.observe(call(version))
        counts.observe(call(0))  # asked all the time, so it is not forgotten
    assert len(counts.of("tiny", "shop")) == 20
    assert counts.of("tiny", "shop")[0]["num_requests"] == 31
