import json

import pytest
from by_hand import FACTS, GIB, GPU_MIB, MIB, PRECISION, lora_training_items

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import BadOverride, DoesNotFit, TrainingPlan, plan_training

CPU = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)
PRESETS = {  # r, accumulation, gradient checkpointing of モデル別推奨設定
    "large": (32, 8, True),
    "medium": (16, 4, False),
    "small": (8, 2, False),
}
BATCH = {  # preset, and the batch table's cell at the planned precision
    "smollm2-135m-instruct": ("small", 32),
    "qwen2.5-14b-instruct": ("medium", 16),
    "qwen2.5-32b-instruct": ("large", 8),
    "calm3-22b-chat": ("large", 16),
    "deepseek-r1-distill-qwen-32b-japanese": ("large", 4),
    "elyza-japanese-llama-2-7b-instruct": ("medium", 32),
    "japanese-gpt2-small": ("small", 32),
    "japanese-stablelm-3b-4e1t-instruct": ("small", 32),
    "llama-3.1-70b-instruct": ("large", 4),
    "phi-3.5-moe-instruct": ("large", 2),
}


def hand_items(name: str, *, micro: int, checkpointing: bool, length: int = 1024) -> dict[str, float]:
    precision, size = PRECISION[name]
    r = PRESETS[BATCH[name][0]][0]
    return lora_training_items(name, precision, size, micro=micro, length=length, r=r, checkpointing=checkpointing)


def reason(plan: TrainingPlan, field: str) -> tuple[str, str]:
    decision = next(d for d in plan.decisions if d.field == field)
    return decision.source, decision.reason


def arrangements(name: str) -> list[tuple[int, bool]]:
    """Micro batch and checkpointing in the order in which a plan tries them under DDP."""
    preset, first = BATCH[name]
    micros = [first >> n for n in range(first.bit_length())]
    return [(m, c) for c in sorted({PRESETS[preset][2], True}) for m in micros]


@pytest.mark.parametrize("gpu", GPU_MIB)
@pytest.mark.parametrize("name", FACTS)
def test_every_model_on_every_gpu_against_sums_done_by_hand(name: str, gpu: str) -> None:
    available = 0.92 * GPU_MIB[gpu] * MIB
    fitting = [
        (micro, checkpointing)
        for micro, checkpointing in arrangements(name)
        if sum(hand_items(name, micro=micro, checkpointing=checkpointing).values()) <= available
    ]
    if not fitting:  # not under DDP: something must leave the GPU, or nothing helps
        try:
            plan = plan_training(find(name), declared(gpu=gpu))
        except DoesNotFit as error:
            assert "It fits " in str(error)  # noqa: PT017  # either answer is right; this is what one must hold
            return
        assert plan.strategy == "deepspeed"
        assert plan.offload_optimizer
        assert plan.memory.total_bytes <= available
        assert plan.host_memory is not None
        assert plan.host_memory.total_bytes <= 0.8 * 2 * GPU_MIB[gpu] * MIB
        return
    plan = plan_training(find(name), declared(gpu=gpu))
    micro, checkpointing = fitting[0]
    assert (plan.micro_batch_size, plan.gradient_checkpointing, plan.strategy) == (micro, checkpointing, "ddp")
    by_hand = hand_items(name, micro=micro, checkpointing=checkpointing)
    assert {i.name: i.num_bytes for i in plan.memory.items} == pytest.approx(
        {k: v for k, v in by_hand.items() if v}, abs=64
    )
    assert plan.memory.total_bytes <= plan.memory.available_bytes
    preset, table = BATCH[name]
    assert plan.effective_batch_size == table * PRESETS[preset][1]
    assert plan.precision == PRECISION[name][0]
    assert plan.method == ("qlora" if plan.precision in ("int8", "nf4") else "lora")
    assert plan.lora is not None
    assert plan.lora.r == PRESETS[preset][0]


def test_llama_70b_on_an_a100_40g_moves_its_state_to_the_cpu() -> None:
    plan = plan_training(find("llama-3.1-70b-instruct"), declared(gpu="A100-40G"))
    # 39.5 GB of weights are 36.8 GiB: all that may be used of 40
    assert (plan.strategy, plan.zero_stage, plan.offload_param, plan.offload_optimizer) == ("deepspeed", 3, True, True)
    assert reason(plan, "offload_param") == (
        "size rule",
        "the specification has CPUオフロード: 必須 for this model, and it does not fit otherwise",
    )
    assert reason(plan, "offload_optimizer")[0] == "size rule"
    assert any("bnb_4bit_quant_storage" in warning for warning in plan.warnings)
    assert plan.host_memory is not None
    # 414,187,520 x 32/16... rank 32 on seven linears of 80 layers: 8 Adam bytes and 4 gradient bytes each
    lora = FACTS["llama-3.1-70b-instruct"].lora(32)
    assert plan.host_memory.num_bytes("optimizer") == 8 * lora
    assert plan.host_memory.num_bytes("weights") == pytest.approx(39.5e9, abs=0.05e9)


def test_llama_70b_on_an_h100_stays_on_the_gpu_and_says_that_the_specification_would_not() -> None:
    plan = plan_training(find("llama-3.1-70b-instruct"), declared(gpu="H100"))
    assert (plan.strategy, plan.offload_param) == ("ddp", False)
    source, why = reason(plan, "offload_param")
    assert source == "memory"
    assert "CPUオフロード: 必須" in why
    assert "offload_param=true forces it" in why


def test_70b_in_full_on_eight_h100_shards_and_offloads() -> None:
    plan = plan_training(find("llama-3.1-70b-instruct"), declared(gpu="H100", num_gpus=8), method="full")
    assert (plan.precision, plan.zero_stage, plan.offload_optimizer, plan.offload_param) == ("bf16", 3, True, False)
    params = 70_553_706_496
    assert plan.memory.num_bytes("weights") == params * 2 // 8
    assert plan.host_memory is not None
    # Adam beside 16-bit weights: an fp32 copy and two moments
    assert plan.host_memory.num_bytes("optimizer") == 12 * params
    assert plan.host_memory.num_bytes("gradients") == 2 * params
    assert (
        any("The specification requires" in w for w in plan.warnings) is False
    )  # the method asked for 16 bit by itself


def test_full_training_of_a_small_model_takes_sixteen_bytes_a_parameter() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), declared(gpu="A100-80G"), method="full")
    state = sum(plan.memory.num_bytes(name) for name in ("weights", "gradients", "optimizer"))
    assert (plan.precision, plan.lora, state) == ("fp32", None, 16 * 134_515_008)
    assert (plan.learning_rate, plan.lr_scheduler_type, plan.learning_rate_preset.warmup_ratio) == (5e-5, "cosine", 0.1)


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_the_effective_batch_is_the_same_on_any_number_of_workers(num_gpus: int) -> None:
    plan = plan_training(find("calm3-22b-chat"), declared(gpu="A100-40G", num_gpus=num_gpus))
    assert (plan.num_workers, plan.effective_batch_size) == (num_gpus, 128)


def test_a_batch_that_the_workers_do_not_divide_grows_and_says_so() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), declared(gpu="H100", num_gpus=3))
    # 64 samples over 3 workers: 22 each
    assert plan.effective_batch_size == 66
    assert any(w.startswith("The effective batch is 66 samples instead of 64") for w in plan.warnings)


def test_the_users_micro_batch_keeps_the_effective_one() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), declared(gpu="H100"), overrides={"micro_batch_size": 4})
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (4, 16)
    both = {"micro_batch_size": 4, "gradient_accumulation_steps": 3}
    plan = plan_training(find("smollm2-135m-instruct"), declared(gpu="H100"), overrides=both)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (4, 3)
    plan = plan_training(find("smollm2-135m-instruct"), declared(gpu="H100"), overrides={"effective_batch_size": 8})
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (8, 1)


def test_the_users_accumulation_is_kept_where_it_fits() -> None:
    card, wishes = find("smollm2-135m-instruct"), {"gradient_accumulation_steps": 8}
    plan = plan_training(card, declared(gpu="H100"), overrides=wishes)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (32, 8)
    # 29 GiB of activations with 32 samples, and half of them with 16; an A10G has 20.7
    plan = plan_training(card, declared(gpu="A10G"), overrides=wishes)
    assert plan.effective_batch_size == 32 * 8
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (16, 16)
    assert any(w.startswith("gradient_accumulation_steps is 16 instead of 8") for w in plan.warnings)


def test_both_wishes_count_over_all_workers() -> None:
    wishes = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides=wishes, num_workers=2, max_length=256)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.effective_batch_size) == (2, 4, 16)
    assert plan.warnings == ()


def test_int8_that_does_not_fit_offers_nf4_and_larger_machines() -> None:
    # 32.0 GiB of weights and 3.5 of the rest: an A100-40G has 36.8
    message = r"It fits with method 'qlora' at precision 'nf4', or on 1 x A100-40G"
    with pytest.raises(DoesNotFit, match=message):
        plan_training(find("deepseek-r1-distill-qwen-32b-japanese"), declared(gpu="A10G"))


def test_a_micro_batch_that_does_not_fit_offers_a_smaller_one() -> None:
    wishes = {"micro_batch_size": 64, "gradient_checkpointing": False}
    with pytest.raises(DoesNotFit, match=r"micro batch 64 x 1024 tokens.*with micro_batch_size 1"):
        plan_training(find("smollm2-135m-instruct"), declared(gpu="A10G"), overrides=wishes)


def test_bad_overrides_are_named_all_at_once() -> None:
    wishes = {"r": 0, "lora_alhpa": 4, "learning_rate": "fast"}
    with pytest.raises(BadOverride) as caught:
        plan_training(find("smollm2-135m-instruct"), CPU, overrides=wishes)
    message = str(caught.value)
    assert "r=0 is not a whole number from 1 to 512" in message
    assert "there is no 'lora_alhpa' (meant 'lora_alpha'?)" in message
    assert "learning_rate='fast' is not a number" in message


def test_a_plan_is_plain_json() -> None:
    plan = plan_training(find("llama-3.1-70b-instruct"), declared(gpu="A100-40G"))
    record = plan.to_json()
    assert json.loads(json.dumps(record)) == record
    assert record["effective_batch_size"] == plan.effective_batch_size
    assert record["host_memory"]["total_bytes"] == sum(item["num_bytes"] for item in record["host_memory"]["items"])


def test_every_number_of_a_plan_has_its_reason() -> None:
    plan = plan_training(find("llama-3.1-70b-instruct"), declared(gpu="A100-40G"))
    numbers = {
        "method", "precision", "compute_dtype", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora",
        "max_length", "num_workers", "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
        "strategy", "zero_stage", "offload_optimizer", "offload_gradients", "offload_param", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "loraplus_lr_ratio", "runs_on",
        "weight_decay", "max_grad_norm", "neftune_noise_alpha",
    }  # fmt: skip
    assert {d.field for d in plan.decisions} == numbers
    assert all(d.reason for d in plan.decisions)


def test_zero_2_shards_gradients_and_optimizer_over_the_workers() -> None:
    plan = plan_training(
        find("elyza-japanese-llama-2-7b-instruct"), declared(gpu="A100-40G", num_gpus=8), method="full"
    )
    params = 6_738_415_616
    assert (plan.zero_stage, plan.num_workers) == (2, 8)
    assert plan.memory.num_bytes("weights") == 2 * params
    assert plan.memory.num_bytes("gradients") == 2 * params // 8
    assert plan.memory.num_bytes("optimizer") == 12 * params // 8
