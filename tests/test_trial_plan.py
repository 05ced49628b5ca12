"""How trials are planned over the catalog: beside each other on one base, or each a run of its own, and why."""

import pytest

from cluster.catalog import all_models, find
from cluster.hardware import declared
from cluster.memory import GIB, DoesNotFit
from cluster.plan import plan_training
from cluster.traps import ImpossibleCombination
from tune_spaces.arguments import SearchRequest, read_arguments
from tune_spaces.spaces import SPACES
from tune_spaces.trial_plan import plan_trials
from tune_spaces.values import BadSpace, Choice

SMALL = "smollm2-135m-instruct"


def asked(*words: str, model: str = SMALL) -> SearchRequest:
    request = read_arguments(["--model", model, "--data", "x.jsonl", "--name", "x", *words])
    assert isinstance(request, SearchRequest)
    return request


@pytest.mark.parametrize("gpu", ["T4", "A10G", "A100-80G", "H100"])
def test_where_one_trial_fits_every_space_has_something_to_try(gpu: str) -> None:
    hardware = declared(gpu=gpu)
    num_fitting = 0
    for card in all_models():
        for method in ("lora", "qlora"):
            try:
                plan = plan_training(card, hardware, method=method, num_workers=1)
            except DoesNotFit:
                continue
            num_fitting += 1
            for name in SPACES:
                trials = plan_trials(asked("--space", name, "--method", method, model=card.name), hardware)
                assert trials.packs.num_trials >= 1
                assert all(values.values for values in trials.space.values() if isinstance(values, Choice))
                assert "learning_rate" in trials.space
                ranks = trials.space.get("r")
                assert plan.lora is not None
                assert ranks is None or (isinstance(ranks, Choice) and plan.lora.r in ranks.values), (card.name, name)
                if trials.alone_because is None:
                    assert trials.packs.memory_bytes <= plan.memory.available_bytes
    assert num_fitting >= 6


def test_what_one_gpu_does_not_hold_is_a_run_over_several() -> None:
    card = max(all_models(), key=lambda card: card.num_parameters())
    hardware = declared(gpu="A100-40G", num_gpus=8)
    request = asked("--precision", "bf16", "--trials", "4", model=card.name)
    with pytest.raises(DoesNotFit):
        plan_training(card, declared(gpu="A100-40G"), method="lora", precision="bf16", num_workers=1)
    trials = plan_trials(request, hardware)
    assert trials.alone_because is not None
    assert trials.alone_because.startswith("a trial needs 8 GPUs (deepspeed, stage 3)")
    assert (trials.packs.num_slots, trials.packs.num_workers) == (1, 1)
    assert trials.plan.num_workers == 8


def test_full_fine_tuning_shares_no_base_and_has_no_ranks() -> None:
    trials = plan_trials(asked("--method", "full"), declared(gpu="H100", num_gpus=4))
    assert trials.alone_because == "full fine-tuning changes the base itself"
    assert set(trials.space) == {"learning_rate"}
    assert trials.packs.num_workers == 4, "one trial on each GPU"
    wide = plan_trials(asked("--method", "full", "--space", "wide"), declared(gpu="H100"))
    assert set(wide.space) == {"learning_rate", "weight_decay", "lr_scheduler_type"}
    with pytest.raises(BadSpace, match="Full fine-tuning has no r; leave it out"):
        plan_trials(asked("--method", "full", "--set-space", "r=8,16"), declared(gpu="H100"))


def test_a_micro_batch_that_fits_nowhere_is_left_out_and_the_largest_one_that_does_bounds_the_pack() -> None:
    words = ("--set-space", "micro_batch_size=1,10,1024", "--set-space", "max_length=256,512", "--method", "qlora")
    trials = plan_trials(asked(*words, model="qwen2.5-32b-instruct"), declared(gpu="A100-80G"))
    assert trials.plan.micro_batch_size == 8, "the largest of all trials would be another one"
    assert trials.space["micro_batch_size"] == Choice(values=(1, 10))
    assert trials.left_out == "micro_batch_size=1024 does not fit into memory and is left out"
    assert trials.plan.max_length == 512, "the longest, on which all are compared"
    alike = ("--max-length", "512", "--method", "qlora")
    slots = {
        size: plan_trials(
            asked("--set", f"micro_batch_size={size}", *alike, model="qwen2.5-32b-instruct"), declared(gpu="A100-80G")
        ).packs.num_slots
        for size in (8, 10)
    }
    assert trials.packs.num_slots == slots[10] < slots[8]
    alone = ("--space", "quick", "--set-space", "learning_rate=1e-4", "--set-space", "micro_batch_size=1,1024")
    with pytest.raises(BadSpace, match=r"micro_batch_size=1024 does not fit .* then there is nothing to search"):
        plan_trials(asked(*alone, model="qwen2.5-14b-instruct"), declared(gpu="A100-80G"))
    with pytest.raises(BadSpace, match="No micro_batch_size of 1024 fits into memory"):
        plan_trials(asked("--set-space", "micro_batch_size=1024", model="qwen2.5-32b-instruct"), declared(gpu="H100"))


def test_a_length_that_fits_nowhere_is_left_out_and_the_longest_that_does_is_the_plans() -> None:
    words = ("--method", "qlora", "--set-space", "max_length=512,2048,32768")
    card = find("qwen2.5-14b-instruct")
    with pytest.raises(DoesNotFit):
        plan_training(card, declared(gpu="A10G"), method="qlora", max_length=32768)
    trials = plan_trials(asked(*words, model=card.name), declared(gpu="A10G"))
    assert trials.space["max_length"] == Choice(values=(512, 2048))
    assert trials.plan.max_length == 2048
    assert trials.left_out is not None
    assert trials.left_out.startswith("max_length=32768 does not fit into memory and is left out")
    with pytest.raises(DoesNotFit, match="It fits with max_length 2048"):
        plan_trials(
            asked("--method", "qlora", "--set-space", "max_length=32768", model="qwen2.5-32b-instruct"),
            declared(gpu="T4"),
        )


def test_workers_per_trial_decide_how_many_trials_run_at_a_time() -> None:
    eight = declared(gpu=None, num_cpus=8, ram_bytes=256 * GIB)
    trials = plan_trials(asked("--workers-per-trial", "2", "--max-length", "128"), eight)
    assert trials.alone_because == "--workers-per-trial 2"
    assert (trials.packs.num_workers, trials.plan.num_workers) == (4, 2)
    assert plan_trials(asked("--workers-per-trial", "1"), eight).alone_because is None
    with pytest.raises(DoesNotFit, match="at most --num-workers 4"):
        plan_trials(asked("--workers-per-trial", "2", "--num-workers", "5", "--max-length", "128"), eight)
    with pytest.raises(ImpossibleCombination, match="A trial has 9 workers; there are 8 cores"):
        plan_trials(asked("--workers-per-trial", "9"), eight)
    with pytest.raises(ImpossibleCombination, match="pbt copies weights between trials on one base"):
        plan_trials(asked("--workers-per-trial", "2", "--scheduler", "pbt"), eight)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--searcher", "grid"), "a grid cannot go over the range of learning_rate"),
        (("--searcher", "optuna", "--scheduler", "pbt"), "goes with random, not optuna"),
        (
            (
                "--searcher",
                "grid",
                "--space",
                "quick",
                "--set-space",
                f"seed={','.join(map(str, range(10001)))}",
                "--set-space",
                "learning_rate=1e-4",
            ),
            "The grid has 10001 points, at most 10000",
        ),
    ],
)
def test_methods_that_do_not_go_with_a_space_are_refused(words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(BadSpace, match=reason):
        plan_trials(asked(*words), declared(gpu="H100"))


def test_a_grid_has_as_many_trials_as_points() -> None:
    words = ("--searcher", "grid", "--set-space", "learning_rate=1e-4,2e-4,1e-3", "--set-space", "lora_alpha=16")
    trials = plan_trials(asked(*words, "--trials", "3"), declared(gpu="H100"))
    assert trials.num_trials == 5 * 3
