"""How workers share a training run: strategies, ZeRO stages, offload, and what excludes what."""

import pytest
from by_hand import FACTS, GIB

from cluster.catalog import find
from cluster.hardware import declared
from cluster.model_card import Precision
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


def test_fsdp_shards_the_base_and_loads_it_in_the_ram_first() -> None:
    hardware = declared(gpu="A100-40G", num_gpus=4, ram_bytes=512 * GIB)
    plan = plan_training(find("qwen2.5-14b-instruct"), hardware, method="lora", overrides={"strategy": "fsdp"})
    params, linear = FACTS["qwen2.5-14b-instruct"].params, FACTS["qwen2.5-14b-instruct"].linear()
    assert (plan.strategy, plan.zero_stage, plan.precision) == ("fsdp", 0, "bf16")
    assert plan.memory.num_bytes("weights") == 2 * params // 4
    assert plan.memory.num_bytes("optimizer") == 8 * FACTS["qwen2.5-14b-instruct"].lora(16)
    assert plan.memory.num_bytes("gathered layers") == 2 * (params - linear + 2 * (linear // 48))
    assert plan.host_memory is not None
    assert plan.host_memory.num_bytes("weights") == 4 * 2 * params


def test_fsdp_shards_everything_of_full_fine_tuning() -> None:
    hardware = declared(gpu="A100-40G", num_gpus=8, ram_bytes=512 * GIB)
    name = "elyza-japanese-llama-2-7b-instruct"
    plan = plan_training(find(name), hardware, method="full", overrides={"strategy": "fsdp"})
    params = FACTS[name].params
    assert [plan.memory.num_bytes(item) for item in ("weights", "gradients", "optimizer")] == [
        2 * params // 8, 2 * params // 8, 12 * params // 8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "precision", "extra", "message"),
    [
        ("H100", "int8", {}, "FSDP cannot shard int8 or 4-bit weights"),
        ("H100", "nf4", {}, "FSDP cannot shard int8 or 4-bit weights"),
        ("T4", "fp16", {}, "FSDP in fp16 is not proven"),
        ("H100", "bf16", {"offload_param": True}, "strategy 'fsdp' has no offload_param: that is DeepSpeed's"),
    ],
)
def test_what_does_not_go_with_fsdp_is_refused(
    gpu: str, precision: Precision, extra: dict[str, object], message: str
) -> None:
    with pytest.raises(ImpossibleCombination, match=message):
        plan_training(
            find("smollm2-135m-instruct"),
            declared(gpu=gpu, num_gpus=2),
            precision=precision,
            overrides={"strategy": "fsdp"} | extra,
        )


def test_fsdp_on_a_cpu_saves_no_weights() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides={"strategy": "fsdp"})
    assert (plan.strategy, plan.num_workers, plan.host_memory) == ("fsdp", 2, None)
    assert plan.memory.num_bytes("weights") == 2 * 4 * FACTS["smollm2-135m-instruct"].params


def test_data_parallel_is_one_process_and_says_that_ddp_is_better() -> None:
    for hardware in (CPU, declared(gpu="H100")):
        plan = plan_training(find("smollm2-135m-instruct"), hardware, overrides={"strategy": "dp"})
        assert (plan.strategy, plan.num_workers) == ("dp", 1)
        assert any("'ddp' gives the same gradients and uses all of it" in w for w in plan.warnings)
    with pytest.raises(ImpossibleCombination, match="strategy 'dp' is one process: leave num_workers out"):
        plan_training(find("smollm2-135m-instruct"), CPU, overrides={"strategy": "dp"}, num_workers=2)
    with pytest.raises(ImpossibleCombination, match=r"nn\.DataParallel cannot copy quantized weights"):
        plan_training(find("smollm2-135m-instruct"), CPU, overrides={"strategy": "dp"}, method="qlora")


def test_data_parallel_over_several_gpus_is_planned_as_ddp_and_says_why() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), declared(gpu="H100", num_gpus=4), overrides={"strategy": "dp"})
    assert (plan.strategy, plan.num_workers) == ("ddp", 4)
    assert any("its threads share what tells samples and adapters apart" in w for w in plan.warnings)
