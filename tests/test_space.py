"""Search spaces: read, bounded, pruned by memory."""

from dataclasses import replace

import pytest

from cluster.catalog import find
from cluster.hardware import declared
from cluster.memory import GIB, DoesNotFit
from cluster.plan import TrainingPlan, plan_training
from tune_spaces.pack_plan import MAX_SLOTS, pack_bytes, plan_packs, prune_packed
from tune_spaces.points import first_guess
from tune_spaces.spaces import SPACES, space_of
from tune_spaces.trial_jobs import adapter_bytes
from tune_spaces.values import BadSpace, Choice, Range, read_values


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return plan_training(find("qwen2.5-14b-instruct"), declared(gpu="A100-80G"), method="lora", num_workers=1)


def test_values_are_read_as_choices_and_ranges() -> None:
    assert read_values("r", "4, 8,16") == Choice(values=(4, 8, 16))
    assert read_values("learning_rate", "1e-5..1e-3") == Range(low=1e-5, high=1e-3, scale="log")
    assert read_values("lora_dropout", "0..0.2") == Range(low=0.0, high=0.2, scale="linear")
    assert read_values("use_rslora", "true,false") == Choice(values=(True, False))
    assert read_values("lr_scheduler_type", "cosine") == Choice(values=("cosine",))


@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("r", "4,,8", "empty value"),
        ("learning_rate", "1e-3..1e-5", "empty range: 0.001 is not below 1e-05"),
        ("learning_rate", "low..high", "no range of numbers"),
    ],
)
def test_what_is_no_value_is_refused(field: str, text: str, reason: str) -> None:
    with pytest.raises(BadSpace, match=reason):
        read_values(field, text)


def test_every_named_space_holds_the_plans_own_choice(plan: TrainingPlan) -> None:
    assert plan.lora is not None
    default = {
        "r": plan.lora.r,
        "lora_alpha": plan.lora.lora_alpha,
        "learning_rate": plan.learning_rate,
        "targets": "all",
        "lora_dropout": plan.lora.lora_dropout,
        "weight_decay": 0.0,
        "lr_scheduler_type": plan.lr_scheduler_type,
    }
    assert set(SPACES) == {"quick", "standard", "wide"}
    for name in SPACES:
        space = space_of(name, plan, {})
        assert first_guess(space, default) == {field: default[field] for field in space}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": "8"}, "no field 'rank' to search; choose from r, "),
        ({"r": "0,8"}, "r=0 is outside of its bounds, 1 to 512"),
        ({"lora_alpha": "much"}, "lora_alpha=much is no number; its bounds are 1 to 4096"),
        ({"micro_batch_size": "0,4"}, "micro_batch_size=0 is outside of its bounds, 1 to 1024"),
        ({"r": "4..64"}, "r takes whole numbers; list them"),
        ({"learning_rate": "1e-3..2"}, "learning_rate=2.0 is outside of its bounds"),
        ({"lr_scheduler_type": "warm"}, "lr_scheduler_type cannot be warm; choose from linear"),
        ({"r": "8", "lora_alpha": "16", "learning_rate": "1e-4"}, "nothing to search"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(plan: TrainingPlan, changes: dict[str, str], reason: str) -> None:
    with pytest.raises(BadSpace, match=reason):
        space_of("standard", plan, {field: read_values(field, text) for field, text in changes.items()})
    with pytest.raises(BadSpace, match="choose one of quick, standard, wide"):
        space_of("huge", plan, {})


def test_a_pack_holds_as_many_trials_as_the_memory_left_by_the_base(plan: TrainingPlan) -> None:
    shared, each = pack_bytes(plan, max_r=16)
    # rank 16 on seven linears of 48 layers: q 5120 -> 5120, k and v -> 1024, o 5120 -> 5120, gate and up -> 13824, down
    per_rank = 48 * ((5120 + 5120) * 2 + (5120 + 1024) * 2 + (5120 + 13824) * 3)
    assert adapter_bytes(plan, r=16) == 16 * 16 * per_rank
    assert each == 16 * 16 * per_rank
    # one base and process, and what one trial's rows keep, more than 1,024 tokens: the next trial's come after them
    items = {item.name: item.num_bytes for item in plan.memory.items}
    own = sum(items[name] for name in ("adapters", "gradients", "optimizer"))
    assert plan.micro_batch_size * plan.max_length > 1024
    assert shared == sum(items.values()) - own
    room = plan.memory.available_bytes - shared
    packs = plan_packs(plan, max_r=16, num_trials=64)
    assert packs.num_slots == min(room // each, MAX_SLOTS)
    assert packs.memory_bytes <= plan.memory.available_bytes
    assert packs.num_workers == 1
    assert plan_packs(plan, max_r=16, num_trials=1).num_slots == 1


def test_short_trials_of_a_pack_share_a_pass() -> None:
    cpu = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)
    wishes = {"micro_batch_size": 4, "gradient_checkpointing": False}
    alone = plan_training(find("smollm2-135m-instruct"), cpu, overrides=wishes, max_length=512, num_workers=1)
    shared, _ = pack_bytes(alone, max_r=8)
    items = {item.name: item.num_bytes for item in alone.memory.items}
    # 512 tokens at once of one trial, 1,024 of several
    assert shared == items["weights"] + items["process"] + items["logits"] + 2 * items["activations"]


def test_ranks_that_do_not_fit_are_left_out_and_said(plan: TrainingPlan) -> None:
    shared, each = pack_bytes(plan, max_r=8)
    tight = replace(plan, memory=replace(plan.memory, available_bytes=shared + each))
    space, left_out = prune_packed({"r": Choice(values=(8, 64))}, tight, num_workers=None)
    assert space == {"r": Choice(values=(8,))}
    assert left_out is not None
    assert left_out.startswith("r=64 ")
    assert prune_packed({"r": Choice(values=(8,))}, tight, num_workers=None) == ({"r": Choice(values=(8,))}, None)
    with pytest.raises(BadSpace, match=r"No rank of 64 fits into memory; give smaller ones\. The smallest needs"):
        prune_packed({"r": Choice(values=(64,))}, tight, num_workers=None)
    with pytest.raises(DoesNotFit, match=f"there are {tight.memory.available_bytes / GIB:.1f} GiB"):
        plan_packs(tight, max_r=64, num_trials=4)
