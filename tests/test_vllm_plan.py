"""What a plan knows of vLLM 0.29: which checkpoints it takes, what they weigh, and what is refused with a reason."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.catalog import find
from cluster.config_json import card_facts
from cluster.hardware import Hardware, declared, detect
from cluster.model_card import PREQUANTIZED, ModelCard
from cluster.plan import ServingPlan, plan_serving, plan_training
from cluster.traps import ImpossibleCombination
from serve_apps.vllm_args import CPU_BLOCK_TOKENS, engine_kwargs, placement

CPU, H100 = replace(detect(), cpu_features=("avx512f", "avx512_vnni")), declared(gpu="H100")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LINEARS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # 6,979,321,856 weights
ROWS = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
REST = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096  # embedding, head, norms
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"},
        }
    },
}
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128}}},
}
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "symmetric": True}}},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def card_of(folder: Path, quantization: dict[str, Any]) -> ModelCard:
    """The card of a folder whose `config.json` has this `quantization_config`."""
    (folder / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    return find(str(folder))


@pytest.mark.parametrize(
    ("published", "bits", "group_size", "is_symmetric", "is_float"),
    [
        (W8A8, 8, None, True, False),
        (W4A16, 4, 128, True, False),
        (FP8, 8, None, True, True),
        (GPTQ, 4, 128, True, False),
        (GPTQ | {"sym": False, "group_size": -1}, 4, None, False, False),
        (AWQ, 4, 128, False, False),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}, 4, 64, False, False),
    ],
)
def test_a_quantized_checkpoint_is_read_from_its_config(
    published: dict[str, Any], bits: int, group_size: int | None, is_symmetric: bool, is_float: bool
) -> None:
    facts = card_facts(LLAMA | {"quantization_config": published}, origin="x")
    assert facts["checkpoint_quantization"] == published["quant_method"]
    assert (facts["checkpoint_bits"], facts["checkpoint_group_size"]) == (bits, group_size)
    assert (facts["checkpoint_is_symmetric"], facts["checkpoint_is_float"]) == (is_symmetric, is_float)


@pytest.mark.parametrize(
    ("published", "precision", "linear_bytes"),
    [
        (W8A8, "compressed-tensors", LINEARS + 4 * ROWS),
        (W4A16, "compressed-tensors", LINEARS // 2 + 4 * LINEARS // 128),
        (GPTQ, "gptq", LINEARS // 2 + 20 * (LINEARS // 128) // 8),  # an fp16 scale and a 4-bit zero point a group
        (AWQ, "awq", LINEARS // 2 + 20 * (LINEARS // 128) // 8),
    ],
)
def test_a_quantized_checkpoint_goes_to_vllm_at_its_own_weight(
    tmp_path: Path, published: dict[str, Any], precision: str, linear_bytes: int
) -> None:
    plan = plan_serving(card_of(tmp_path, published), H100)
    assert (plan.engine, plan.precision, plan.compute_dtype) == ("vllm", precision, "float16")
    assert plan.memory.num_bytes("weights") == linear_bytes + 2 * REST
    assert plan.max_loras == 8  # vLLM's LoRA goes with quantized linears too
    assert "quantization" not in engine_kwargs(plan)  # vLLM reads it from the checkpoint
    with pytest.raises(ImpossibleCombination, match="served by vLLM alone; name the unquantized checkpoint"):
        plan_serving(plan.card, H100, engine="transformers")


def test_adapters_are_planned_where_vllm_has_lora(tmp_path: Path) -> None:
    card = card_of(tmp_path, W8A8)
    plan = plan_serving(card, CPU)
    assert plan.max_loras == 0
    (reason,) = [decision.reason for decision in plan.decisions if decision.field == "max_loras"]
    assert reason == "vLLM 0.29 has no LoRA on int8 weights on a CPU"
    with pytest.raises(ImpossibleCombination, match="no LoRA on int8 weights on a CPU; name the unquantized"):
        plan_serving(card, CPU, num_adapters=1)
    assert plan_serving(card_of(tmp_path, GPTQ), CPU).max_loras == 8
    assert plan_serving(card, H100).max_loras == 8


def cpu(*features: str) -> Hardware:
    return replace(CPU, cpu_features=features)


def test_the_dtype_on_a_cpu_is_one_that_vllms_kernels_have(tmp_path: Path) -> None:
    assert plan_serving(card_of(tmp_path, W8A8), cpu()).compute_dtype == "float32"
    for four_bits in (W4A16, GPTQ, AWQ):
        plan = plan_serving(card_of(tmp_path, four_bits), cpu("avx512f"))
        assert (plan.engine, plan.compute_dtype) == ("vllm", "bfloat16")


@pytest.mark.parametrize("four_bits", [W4A16, GPTQ, AWQ])
def test_4_bit_checkpoints_need_avx_512_on_a_cpu(tmp_path: Path, four_bits: dict[str, Any]) -> None:
    card = card_of(tmp_path, four_bits)
    with pytest.raises(ImpossibleCombination, match=r"with AVX-512 .*which this one lacks"):
        plan_serving(card, cpu("avx_vnni"))
    assert not any("AVX-512" in warning for warning in plan_serving(card, cpu("avx512f")).warnings)
    elsewhere = plan_serving(card, replace(CPU, cpu_features=None))
    assert any("AVX-512" in warning for warning in elsewhere.warnings)


def test_8_bit_products_are_warned_of_where_they_may_saturate(tmp_path: Path) -> None:
    card = card_of(tmp_path, W8A8)
    for hardware in (cpu(), cpu("avx512f"), replace(CPU, cpu_features=None)):
        assert any("beyond +-63 saturate" in warning for warning in plan_serving(card, hardware).warnings)
    for vnni in ("avx512_vnni", "avx_vnni"):
        assert not any("saturate" in warning for warning in plan_serving(card, cpu(vnni)).warnings)


@pytest.mark.parametrize(
    ("published", "gpu", "message"),
    [
        (GPTQ | {"sym": False}, True, r"symmetric GPTQ only .*older versions had a kernel"),
        (GPTQ | {"bits": 3}, True, "GPTQ in 4 or 8 bits, not 3"),
        (GPTQ | {"bits": 8}, False, "GPTQ in 4 bits on a CPU, not 8"),
        (AWQ | {"bits": 8}, True, "AWQ in 4 bits, not 8"),
        (FP8, False, r"small floats \(FP8\) on GPUs only"),
        ({"quant_method": "hqq"}, True, "published quantized with 'hqq'; planned are gptq, awq, compressed-tensors"),
    ],
)
def test_a_checkpoint_that_vllm_does_not_take_is_refused_with_a_way_out(
    tmp_path: Path, published: dict[str, Any], gpu: bool, message: str
) -> None:
    with pytest.raises(ImpossibleCombination, match=message):
        plan_serving(card_of(tmp_path, published), H100 if gpu else CPU)


@pytest.mark.parametrize("published", [W8A8, GPTQ, AWQ])
def test_a_quantized_checkpoint_is_not_trained_on(tmp_path: Path, published: dict[str, Any]) -> None:
    with pytest.raises(ImpossibleCombination, match="can be served, not trained on: name the unquantized checkpoint"):
        plan_training(card_of(tmp_path, published), H100)


@pytest.mark.parametrize("precision", PREQUANTIZED)
def test_no_checkpoint_is_quantized_at_load_time(precision: Any) -> None:
    with pytest.raises(ImpossibleCombination, match=r"is no .* checkpoint.*calibration data.*'int8' or 'nf4'"):
        plan_serving(find("calm3-22b-chat"), H100, precision=precision)


def test_the_kinds_of_gptq_are_those_of_vllms_source() -> None:
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    assert set(AutoGPTQConfig.TYPE_MAP) == {(4, True), (8, True)}


def test_the_last_version_with_the_published_stablelm_is_named() -> None:
    from vllm.model_executor.models.registry import _PREVIOUSLY_SUPPORTED_MODELS

    with pytest.raises(ImpossibleCombination, match=r"as it is published: (\S+) was the last") as caught:
        plan_serving(find("japanese-stablelm-3b-4e1t-instruct"), H100, engine="vllm")
    assert _PREVIOUSLY_SUPPORTED_MODELS["StableLMEpochForCausalLM"] in str(caught.value)


def vllm_plan(gpu: str | None, **wishes: Any) -> ServingPlan:
    hardware = declared(gpu=gpu, num_gpus=4) if gpu else CPU
    return plan_serving(find(wishes.pop("model", "qwen2.5-32b-instruct")), hardware, engine="vllm", **wishes)


def test_vllm_is_told_the_numbers_of_the_plan() -> None:
    plan = vllm_plan("A100-40G", precision="bf16", max_model_len=8192, max_num_seqs=4, num_adapters=3, max_lora_rank=10)
    kwargs = engine_kwargs(plan)
    assert plan.tensor_parallel_size > 1
    told = {name: kwargs[name] for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_lora_rank")}
    assert told == {
        "tensor_parallel_size": plan.tensor_parallel_size,
        "max_model_len": 8192,
        "max_num_seqs": 4,
        "max_lora_rank": 16,
    }
    assert (kwargs["max_loras"], kwargs["max_cpu_loras"], kwargs["enable_lora"]) == (3, 3, True)
    assert (kwargs["dtype"], kwargs["gpu_memory_utilization"]) == ("bfloat16", plan.gpu_memory_utilization)
    where = placement(plan)
    assert where["accelerator_type"] == "A100-40G"
    assert where["placement_group_config"] == {"bundle_per_worker": {"GPU": 1.0}}
    assert engine_kwargs(vllm_plan("A100-80G", precision="nf4"))["quantization"] == "bitsandbytes"
    assert "enable_lora" not in engine_kwargs(vllm_plan("A100-80G", num_adapters=0))


def test_on_a_cpu_the_cache_is_as_large_as_planned_and_one_lora_slot_stays_empty() -> None:
    plan = vllm_plan(None, model="smollm2-135m-instruct", max_model_len=512, max_num_seqs=4, num_adapters=2)
    kwargs = engine_kwargs(plan)
    tokens = kwargs["kv_cache_memory_bytes"] / (45 * 1024)  # 22.5 KiB a token in 16 bit, twice that in fp32
    assert 4 * 512 < tokens <= 4 * 512 + 3 * CPU_BLOCK_TOKENS
    assert (kwargs["max_loras"], kwargs["max_cpu_loras"]) == (3, 3)
    assert placement(plan)["runtime_env"]["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_vllm_on_a_cpu_is_three_processes() -> None:
    plans = [vllm_plan(None, model="smollm2-135m-instruct"), plan_serving(find("smollm2-135m-instruct"), CPU)]
    assert [plan.memory.num_bytes("process") / 2**20 for plan in plans] == [2048, 768]


def test_engine_arguments_are_vllms_own() -> None:
    from dataclasses import fields

    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in fields(AsyncEngineArgs)}
    for plan in (vllm_plan("H100"), vllm_plan(None, model="smollm2-135m-instruct"), vllm_plan("H100", precision="nf4")):
        assert set(engine_kwargs(plan)) <= known


def test_dora_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    from cluster.models.peft_files import AdapterFilesError, read_spec

    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFilesError, match="use_dora=true"):
        read_spec(tmp_path)


def test_the_engine_is_chosen_on_the_command_line() -> None:
    command = Path(sys.executable).with_name("kajiya")

    def kajiya(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([command, *words], capture_output=True, text=True, timeout=120, check=False)

    made = json.loads(kajiya("plan", "smollm2-135m-instruct", "--engine", "vllm", "--json").stdout)
    assert made["engine"] == "vllm"
    # `up` plans before it starts anything.
    refused = kajiya("up", "smollm2-135m-instruct", "--engine", "vllm", "--precision", "int8")
    assert refused.returncode == 2
    assert "no 8-bit bitsandbytes in flight; use 'transformers'" in refused.stderr
