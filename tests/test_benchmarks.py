"""What the measurements conclude from numbers; the servers themselves are measured by `make bench`."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks import load, training
from benchmarks.bench import bench
from benchmarks.claims import Claim, Result, print_claims, print_result, record
from benchmarks.load import Round, Target, alternate, question, spread
from benchmarks.training_run import RunNumbers
from cluster.keys import KeyStore
from cluster.registry import Registry


@pytest.mark.parametrize(
    ("measured", "is_enough", "is_little"), [(0.79, False, True), (0.8, True, True), (0.81, True, False)]
)
def test_a_bound_is_kept_up_to_itself(measured: float, is_enough: bool, is_little: bool) -> None:
    assert Claim(what="x", measured=measured, bound=0.8, direction="at least").is_met is is_enough
    assert Claim(what="x", measured=measured, bound=0.8, direction="at most").is_met is is_little


def test_speed_is_all_tokens_of_all_texts_over_the_whole_round() -> None:
    tokenizer: Any = lambda texts: SimpleNamespace(input_ids=[text.split() for text in texts])  # noqa: E731
    measured = Round(texts=("a b c", "d e"), seconds=2.0, median_first_s=0.1)
    assert measured.tokens_per_s(tokenizer) == 2.5


def test_targets_take_turns_and_their_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def run_round(target: Target, *, num_streams: int, max_tokens: int) -> Round:
        asked.append(target.url)
        return Round(texts=(str(len(asked)),) * num_streams, seconds=max_tokens, median_first_s=0)

    monkeypatch.setattr(load, "run_round", run_round)
    targets = {name: Target(url=name, models=("m",)) for name in ("a", "b")}
    rounds = alternate(targets, num_rounds=2, num_streams=1, max_tokens=1)
    assert asked == ["a", "b", "a", "b", "a", "b"]
    assert {name: [r.texts[0] for r in measured] for name, measured in rounds.items()} == {
        "a": ["3", "5"],
        "b": ["4", "6"],
    }


def test_streams_of_a_round_ask_different_questions() -> None:
    assert len({question(i) for i in range(16)}) == 16


def test_tables_name_what_failed_and_the_record_holds_every_number() -> None:
    claim = Claim(what="speed", measured=1.9, bound=2, direction="at least")
    result = Result(numbers={"ours": spread([3.0, 1.0, 2.0])}, unit="tokens/s", claims=(claim,), notes=("a note",))
    text = io.StringIO()
    print_result("throughput", result, Console(file=text, width=100))
    print_claims([claim], Console(file=text, width=100))
    assert "NOT MET" in text.getvalue()
    assert "a note" in text.getvalue()
    assert record({"throughput": result})["throughput"] == {
        "unit": "tokens/s",
        "numbers": {"ours": {"median": 2.0, "lowest": 1.0, "highest": 3.0, "all": [3.0, 1.0, 2.0]}},
        "claims": [{"what": "speed", "measured": 1.9, "at least": 2, "unit": "x", "is_met": False}],
        "notes": ("a note",),
    }


def test_a_run_has_a_key_and_a_registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAJIYA_REGISTRY", "KAJIYA_KEYS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back after the test
    with bench(num_rounds=1, num_streams=1, max_tokens=1) as run:
        assert [record.name for record in KeyStore.default().list()] == ["bench"]
        assert Registry.default().list() == ()
        assert run.kajiya().headers == {"Authorization": f"Bearer {run.key}"}
        home = run.home
    assert not Path(home).exists()


def run_of(*, num_tokens: int, seconds: float, peak_gib: float, gflop_per_s: float) -> RunNumbers:
    return RunNumbers(
        num_tokens=num_tokens,
        num_trained_tokens=num_tokens // 2,
        seconds=seconds,
        peak_bytes=int(peak_gib * 2**30),
        losses=[1.0],
        matmul_flop_per_s=gflop_per_s * 1e9,
        own_flop_per_s=2 * gflop_per_s * 1e9,
        max_batch_tokens=num_tokens,
    )


def test_training_is_compared_by_medians_and_by_the_operations_of_its_parameters() -> None:
    ours = [run_of(num_tokens=600, seconds=s, peak_gib=3, gflop_per_s=150) for s in (2.0, 3.0, 60.0)]
    theirs = [run_of(num_tokens=100, seconds=1.0, peak_gib=4, gflop_per_s=150)] * 3
    speed, peak, share = training.compare({training.OURS: ours, training.TRL: theirs}).claims
    assert (speed.measured, speed.is_met) == (2.0, False)  # 200 tokens/s over 100
    assert (peak.measured, peak.is_met) == (0.75, False)
    assert share.measured == pytest.approx(200 * 4 * 134_515_008 / 150e9)  # SmolLM2's parameters, its head tied
    assert not share.is_met
