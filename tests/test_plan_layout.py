"""How workers share a training run: strategies, ZeRO stages, offload, and what excludes what."""

import pytest
from by_hand import GIB

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import ImpossibleCombination, TrainingPlan, plan_training

CPU = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)


def reason(plan: TrainingPlan, field: str) -> tuple[str, str]:
    decision = next(d for d in plan.decisions if d.field == field)
    return decision.source, decision.reason


def test_a_worker_needs_a_gpu_of_its_own() -> None:
    with pytest.raises(ImpossibleCombination, match=r"num_workers=3 on 2 x L4: .* at most 2"):
        plan_training(find("smollm2-135m-instruct"), declared(gpu="L4", num_gpus=2), num_workers=3)


def test_offload_without_a_gpu_is_left_out() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides={"offload_optimizer": True})
    assert not plan.offload_optimizer
    assert any("there is no GPU here" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"strategy": "deepspeed"}, ("deepspeed", 2, True, False)),
        ({"zero_stage": 1}, ("deepspeed", 1, False, False)),
        ({"zero_stage": "3"}, ("deepspeed", 3, False, False)),
        ({"offload_optimizer": "yes"}, ("deepspeed", 2, True, False)),
        ({"offload_param": True}, ("deepspeed", 3, True, True)),
        ({"strategy": "ddp"}, ("ddp", 0, False, False)),
    ],
)
def test_the_users_strategy_is_kept(overrides: dict[str, object], expected: tuple[object, ...]) -> None:
    hardware = declared(gpu="H100", num_gpus=2)
    plan = plan_training(find("smollm2-135m-instruct"), hardware, overrides=overrides)
    assert (plan.strategy, plan.zero_stage, plan.offload_optimizer, plan.offload_param) == expected


def test_zero_on_a_cpu_is_the_users_choice() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides={"strategy": "deepspeed", "zero_stage": 2})
    assert (plan.strategy, plan.zero_stage, plan.host_memory) == ("deepspeed", 2, None)


def test_ddp_has_no_offload() -> None:
    with pytest.raises(ImpossibleCombination, match="strategy 'ddp' has no offload_optimizer, zero_stage"):
        plan_training(
            find("smollm2-135m-instruct"),
            declared(gpu="H100"),
            overrides={"strategy": "ddp", "offload_optimizer": True, "zero_stage": 2},
        )


def test_zero_3_with_int8_is_refused() -> None:
    with pytest.raises(ImpossibleCombination, match="ZeRO-3 cannot shard int8"):
        plan_training(find("qwen2.5-14b-instruct"), declared(gpu="H100", num_gpus=2), overrides={"zero_stage": 3})


def test_thresholds_that_are_not_needed_are_explained() -> None:
    plan = plan_training(find("qwen2.5-14b-instruct"), declared(gpu="H100"), method="lora")
    # 29.5 GB of bf16 weights: above 20, below 40
    source, why = reason(plan, "offload_optimizer")
    assert (plan.offload_optimizer, source) == (False, "memory")
    assert "weights of 29.5 GB say CPU; it fits on the GPU" in why
    assert reason(plan, "offload_param") == (
        "size rule",
        "the specification's thresholds for weights of 29.5 GB say GPU",
    )
