"""Which engine serves a plan, and in which types it computes."""

import pytest
from by_hand import GIB

from cluster.catalog import find
from cluster.hardware import Hardware, declared
from cluster.plan import ImpossibleCombination, plan_serving

CPU = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)


@pytest.mark.parametrize(("asked", "planned"), [(1, 1), (2, 8), (8, 8), (24, 32), (65, 128), (512, 512)])
def test_the_rank_is_one_that_vllm_allows(asked: int, planned: int) -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    plan = plan_serving(find("qwen2.5-32b-instruct"), declared(gpu="H200"), max_lora_rank=asked, num_adapters=1)
    assert plan.max_lora_rank == planned
    assert planned in get_args(MaxLoRARanks)


@pytest.mark.parametrize("name", ["japanese-gpt2-small", "japanese-stablelm-3b-4e1t-instruct"])
def test_architectures_without_lora_in_vllm_go_to_transformers(name: str) -> None:
    assert plan_serving(find(name), declared(gpu="H100"), num_adapters=2).engine == "transformers"


@pytest.mark.parametrize(
    ("name", "wishes", "message"),
    [
        ("qwen2.5-14b-instruct", {"precision": "int8"}, "no 8-bit bitsandbytes in flight; use 'transformers'"),
        ("japanese-gpt2-small", {"num_adapters": 1}, "GPT2LMHeadModel takes no LoRA adapters"),
        ("japanese-stablelm-3b-4e1t-instruct", {}, "does not have StableLmForCausalLM as it is published"),
    ],
)
def test_what_vllm_cannot_do_is_refused(name: str, wishes: dict[str, object], message: str) -> None:
    with pytest.raises(ImpossibleCombination, match=message):
        plan_serving(find(name), declared(gpu="H100"), engine="vllm", **wishes)  # type: ignore[arg-type]  # by parameter


def test_vllm_with_a_base_that_takes_no_adapters_serves_the_base() -> None:
    plan = plan_serving(find("japanese-gpt2-small"), declared(gpu="H100"), engine="vllm")
    assert (plan.engine, plan.max_loras) == ("vllm", 0)


def test_4_bit_in_vllm_needs_a_gpu() -> None:
    with pytest.raises(ImpossibleCombination, match="vllm-bnb-plugin loads 4-bit weights on GPUs only"):
        plan_serving(find("smollm2-135m-instruct"), CPU, engine="vllm", precision="nf4")


def test_vllm_on_a_cpu_is_the_users_choice() -> None:
    plan = plan_serving(find("smollm2-135m-instruct"), CPU, engine="vllm")
    assert (plan.engine, plan.precision, plan.num_gpus) == ("vllm", "fp32", 0)


def t4() -> Hardware:
    return declared(gpu="T4")


def test_a_gpu_without_bf16_computes_in_fp16_and_says_so() -> None:
    plan = plan_serving(find("smollm2-135m-instruct"), t4(), precision="bf16")
    assert (plan.precision, plan.compute_dtype) == ("fp16", "float16")
    assert "T4 has no bf16 (it needs compute capability 8.0): fp16 instead." in plan.warnings
    plan = plan_serving(find("elyza-japanese-llama-2-7b-instruct"), t4(), precision="int8")
    assert plan.compute_dtype == "float16"  # the size rule's own


def test_the_20b_rules_bfloat16_yields_to_a_gpu_without_it() -> None:
    plan = plan_serving(find("calm3-22b-chat"), declared(gpu="V100", num_gpus=1), precision="nf4")
    assert plan.compute_dtype == "float16"
    from cluster.plan_precision import choose_compute_dtype
    from cluster.plan_record import Log

    log = Log()
    assert choose_compute_dtype(find("calm3-22b-chat"), declared(gpu="V100"), log, "int8") == "float16"
    assert log.warnings == ["V100 has no bf16: compute_dtype float16 instead of the size rule of 20B-32B's bfloat16."]
    assert log.decisions[0].source == "hardware"
    assert choose_compute_dtype(find("calm3-22b-chat"), declared(gpu="A10G"), Log(), "int8") == "bfloat16"


def test_fp32_below_7b_is_kept_on_a_gpu_and_the_better_is_said() -> None:
    plan = plan_serving(find("smollm2-135m-instruct"), declared(gpu="L4"))
    assert plan.precision == "fp32"
    assert any("bf16 halves the memory and is faster here" in warning for warning in plan.warnings)


def test_16_bit_on_a_cpu_is_kept_and_called_slow() -> None:
    plan = plan_serving(find("smollm2-135m-instruct"), CPU, precision="bf16")
    assert plan.precision == "bf16"
    assert any("bf16 products are 7 to 9 times slower" in warning for warning in plan.warnings)


def test_an_unquantized_model_that_must_be_quantized_is_warned_about() -> None:
    plan = plan_serving(find("qwen2.5-32b-instruct"), declared(gpu="H200"), precision="bf16")
    assert any("requires qwen2.5-32b-instruct in 4 bits" in warning for warning in plan.warnings)


def test_offload_that_the_specification_requires_is_not_needed_where_it_fits() -> None:
    plan = plan_serving(find("llama-3.1-70b-instruct"), declared(gpu="H100"))
    assert any("CPUオフロード: 必須 is not needed here" in warning for warning in plan.warnings)
