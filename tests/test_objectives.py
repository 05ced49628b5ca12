"""What is made small, which trials no other beats, and which of them is kept."""

import pytest

from tune_spaces.objectives import MEASURED, OBJECTIVES, badness, chosen, latency_ratio, pareto, read_objectives
from tune_spaces.values import BadSpace

# loss and bytes of five trials: the third is beaten by the second, the last by the first
POINTS = [(2.00, 400.0), (2.02, 100.0), (2.03, 200.0), (2.50, 25.0), (2.00, 401.0)]


def test_the_front_is_what_no_other_trial_beats() -> None:
    assert pareto(POINTS) == [0, 1, 3]
    assert pareto([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]
    assert pareto([(3.0,), (1.0,), (2.0,)]) == [1]


def test_the_rule_gives_up_no_more_of_the_first_objective_than_allowed() -> None:
    assert chosen(POINTS, within=0.0) == 0
    assert chosen(POINTS, within=0.009) == 0  # up to 2.018
    assert chosen(POINTS, within=0.01) == 1  # up to 2.02
    assert chosen(POINTS, within=0.3) == 3
    # the share of right answers is turned: 0.8 is the best, 0.7 is 12.5% worse
    assert chosen([(-0.8, 9.0), (-0.7, 1.0)], within=0.12) == 0
    assert chosen([(-0.8, 9.0), (-0.7, 1.0)], within=0.13) == 1
    assert chosen([(0.0, 2.0), (0.0, 1.0)], within=0.0) == 1
    assert chosen([(2.0, 1.0, 5.0), (1.9, 1.0, 7.0)], within=0.1) == 0, "equal in the second, so the third decides"


def test_objectives_are_turned_so_that_small_is_good() -> None:
    metrics = {"held_out_loss": 1.5, "exact_match": 0.25, "adapter_bytes": 80}
    assert badness(("held_out_loss", "exact_match", "adapter_bytes"), metrics) == (1.5, -0.25, 80.0)


def test_a_token_reads_the_base_and_the_adapter() -> None:
    assert latency_ratio(weight_bytes=400, adapter_bytes=20) == 1.05
    assert latency_ratio(weight_bytes=400, adapter_bytes=0) == 1.0


def test_every_objective_says_whether_it_is_measured() -> None:
    assert all(o.meaning.split(":")[0] in ("measured", "counted", "modelled") for o in OBJECTIVES.values())
    assert [n for n, o in OBJECTIVES.items() if o.meaning.startswith("measured")] == list(MEASURED)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("perplexity", "no objective 'perplexity'; choose from held_out_loss, exact_match"),
        ("held_out_loss,held_out_loss", "held_out_loss is there twice"),
        ("adapter_bytes,held_out_loss", "training does not change adapter_bytes; begin with held_out_loss or"),
        ("", "no objective ''"),
    ],
)
def test_what_is_no_objective_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadSpace, match=reason):
        read_objectives(text)


def test_several_objectives_keep_their_order() -> None:
    assert read_objectives("exact_match, latency_ratio") == ("exact_match", "latency_ratio")
