"""Every row of the specification's tables, typed from it: a training plan gives it, or says why not."""

from dataclasses import replace

import pytest
from test_presets import DEEPSPEED_SECTION

from cluster.catalog import find
from cluster.catalog_rows import ROWS
from cluster.hardware import declared
from cluster.model_card import Precision
from cluster.plan import Method, TrainingPlan, plan_training
from cluster.presets import zero_optimization

GIB = 2**30
H100S = declared(gpu="H100", num_gpus=8, ram_bytes=2048 * GIB)
ONE = declared(gpu="B300", num_gpus=1, ram_bytes=2048 * GIB)
"""One worker, on which every batch of the table is whole."""

MODELS: list[tuple[str, Precision | None, bool]] = [
    # サポート済みモデル一覧: path, 量子化, 必須
    ("Qwen/Qwen2.5-14B-Instruct", "int8", False),
    ("Qwen/Qwen2.5-32B-Instruct", "nf4", True),
    ("cyberagent/calm3-22b-chat", "nf4", False),
    ("cyberagent/DeepSeek-R1-Distill-Qwen-32B-Japanese", "int8", False),
    ("elyza/ELYZA-japanese-Llama-2-7b-instruct", None, False),
    ("rinna/japanese-gpt2-small", None, False),
    ("stabilityai/japanese-stablelm-3b-4e1t-instruct", None, False),
    ("meta-llama/Meta-Llama-3.1-70B-Instruct", "nf4", True),
    ("microsoft/Phi-3.5-MoE-instruct", None, False),
]


def reasons(plan: TrainingPlan, field: str) -> str:
    (decision,) = [d for d in plan.decisions if d.field == field]
    return f"{decision.source}: {decision.reason}"


def by_path(path: str) -> str:
    (name,) = [card.name for card in ROWS if card.model_id == path]
    return name


@pytest.mark.parametrize(("path", "precision", "is_required"), MODELS)
def test_models_are_loaded_as_their_own_lines_say(path: str, precision: Precision | None, is_required: bool) -> None:
    card = find(by_path(path))
    plan = plan_training(card, H100S)
    if precision is not None:
        assert plan.precision == precision
        assert reasons(plan, "precision").startswith("model: ")
    other = plan_training(card, ONE, precision="int8" if precision == "nf4" else "bf16")
    assert any("requires" in warning and "必須" in warning for warning in other.warnings) == is_required


RULES: list[tuple[str, Precision, str]] = [
    # 自動量子化ルール: bits and compute_dtype, for models without a line of their own
    ("llama-3.1-70b-instruct", "nf4", "float16"),  # 32B+
    ("qwen2.5-32b-instruct", "nf4", "float16"),
    ("calm3-22b-chat", "int8", "bfloat16"),  # 20B-32B
    ("qwen2.5-14b-instruct", "int8", "float16"),  # 7B-20B
    ("elyza-japanese-llama-2-7b-instruct", "int8", "float16"),
    ("japanese-stablelm-3b-4e1t-instruct", "fp32", "float32"),  # <7B
    ("japanese-gpt2-small", "fp32", "float32"),
]


@pytest.mark.parametrize(("name", "precision", "compute_dtype"), RULES)
def test_the_size_rules_decide_where_a_model_has_no_line(name: str, precision: Precision, compute_dtype: str) -> None:
    card = replace(find(name), recommended_precision=None, is_quantization_required=False)
    plan = plan_training(card, H100S)
    assert (plan.precision, plan.compute_dtype) == (precision, compute_dtype)
    is_gptq = name in ("qwen2.5-14b-instruct", "elyza-japanese-llama-2-7b-instruct")
    assert any(w.startswith("The specification's auto-gptq") for w in plan.warnings) == is_gptq


def test_experts_that_no_library_quantizes_are_the_exception_that_is_said() -> None:
    plan = plan_training(find("phi-3.5-moe-instruct"), H100S)  # 32B+: 4 bit
    assert plan.precision == "bf16"
    assert "would stay in 16 bit" in reasons(plan, "precision") + " ".join(plan.warnings)


PRESETS = [
    # モデル別推奨設定: r, lora_alpha, lora_dropout, gradient_checkpointing, gradient_accumulation_steps
    ("llama-3.1-70b-instruct", 32, 64, 0.05, True, 8),
    ("calm3-22b-chat", 32, 64, 0.05, True, 8),
    ("qwen2.5-14b-instruct", 16, 32, 0.1, False, 4),
    ("elyza-japanese-llama-2-7b-instruct", 16, 32, 0.1, False, 4),
    ("japanese-stablelm-3b-4e1t-instruct", 8, 16, 0.1, False, 2),
]
BATCHES: dict[str, tuple[int, int, int]] = {
    # 推奨バッチサイズ: float16, 8bit, 4bit
    "llama-3.1-70b-instruct": (1, 2, 4),
    "qwen2.5-32b-instruct": (2, 4, 8),
    "calm3-22b-chat": (4, 8, 16),
    "qwen2.5-14b-instruct": (8, 16, 32),
    "elyza-japanese-llama-2-7b-instruct": (16, 32, 64),
    "japanese-stablelm-3b-4e1t-instruct": (32, 64, 128),
}


@pytest.mark.parametrize(("name", "r", "alpha", "dropout", "checkpointing", "accumulation"), PRESETS)
def test_lora_presets_are_planned_by_size(
    name: str, r: int, alpha: int, dropout: float, checkpointing: bool, accumulation: int
) -> None:
    plan = plan_training(find(name), ONE, method="qlora", precision="nf4", max_length=128)
    assert plan.lora is not None
    assert (plan.lora.r, plan.lora.lora_alpha, plan.lora.lora_dropout) == (r, alpha, dropout)
    assert plan.lora.target_modules == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert (plan.lora.bias, plan.lora.task_type) == ("none", "CAUSAL_LM")
    assert plan.gradient_checkpointing == checkpointing
    assert plan.effective_batch_size == BATCHES[name][2] * accumulation


def test_the_standard_lora_settings_are_had_by_name() -> None:
    lora = plan_training(find("calm3-22b-chat"), ONE, overrides={"lora_preset": "standard"}).lora
    assert lora is not None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (16, 32, 0.1, "none")


@pytest.mark.parametrize("r", [3, 4, 64, 65])
def test_ranks_outside_of_4_to_64_are_warned_of(r: int) -> None:
    plan = plan_training(find("smollm2-135m-instruct"), ONE, overrides={"r": r})
    assert any("outside the specification's 4 to 64" in w for w in plan.warnings) == (r in (3, 65))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("column", "precision"), [(0, "fp16"), (1, "int8"), (2, "nf4")])
def test_batch_sizes_are_the_tables_or_what_fits_with_the_same_step(
    name: str, column: int, precision: Precision
) -> None:
    method: Method = "lora" if precision == "fp16" else "qlora"
    expected = BATCHES[name][column]
    for length in (128, 4096):
        if length > find(name).max_position_embeddings:
            continue
        plan = plan_training(find(name), ONE, method=method, precision=precision, max_length=length)
        assert plan.lora is not None
        assert plan.effective_batch_size == expected * plan.lora.gradient_accumulation_steps
        why = reasons(plan, "micro_batch_size")
        if plan.micro_batch_size == expected:
            assert why.startswith("size rule: the specification's table")
        else:
            assert plan.micro_batch_size < expected
            assert why.startswith(f"memory: {expected} does not fit: the table's batch size is a first guess")


RATES: list[tuple[Method, float, str, str, float]] = [
    # 学習率設定
    ("full", 5e-5, "cosine", "warmup_ratio", 0.1),
    ("lora", 2e-4, "linear", "warmup_steps", 500),
    ("qlora", 1e-4, "constant_with_warmup", "warmup_steps", 100),
]


@pytest.mark.parametrize(("method", "rate", "scheduler", "field", "value"), RATES)
def test_learning_rates_are_planned_by_method(
    method: Method, rate: float, scheduler: str, field: str, value: float
) -> None:
    plan = plan_training(find("smollm2-135m-instruct"), ONE, method=method)
    assert (plan.learning_rate, plan.lr_scheduler_type) == (rate, scheduler)
    assert getattr(plan.learning_rate_preset, field) == value
    assert f"the specification's {method}_finetuning" in reasons(plan, "learning_rate")
    assert plan.learning_rate_preset.clamp(10_000)[1] is None


OFFLOADS = [
    # 自動オフロード: GB of weights; layers, optimizer, gradients
    ("qwen2.5-32b-instruct", "65.5", True, True, True),
    ("calm3-22b-chat", "45.1", True, True, True),
    ("qwen2.5-14b-instruct", "29.5", False, True, True),
    ("elyza-japanese-llama-2-7b-instruct", "13.5", False, False, False),
]


@pytest.mark.parametrize(("name", "gb", "layers", "optimizer", "gradients"), OFFLOADS)
def test_thresholds_of_offload_are_followed_or_the_room_is_named(
    name: str, gb: str, layers: bool, optimizer: bool, gradients: bool
) -> None:
    plan = plan_training(find(name), H100S, method="lora", precision="bf16")
    by_rule = {"offload_param": layers, "offload_optimizer": optimizer, "offload_gradients": gradients}
    for field, on_cpu in by_rule.items():
        why = reasons(plan, field)
        assert f"the specification's thresholds for weights of {gb} GB say {'CPU' if on_cpu else 'GPU'}" in why
        assert getattr(plan, field) == on_cpu or not on_cpu or "it fits on the GPU, where it is faster" in why
    # What the rule says can always be had.
    wanted = {field: True for field, on_cpu in by_rule.items() if on_cpu}
    forced = plan_training(find(name), H100S, method="lora", precision="bf16", overrides=wanted)
    assert all(getattr(forced, field) for field in wanted)
    assert forced.strategy == ("deepspeed" if wanted else "ddp")


def test_llama_70b_has_its_offload_of_layers_where_the_gpu_is_too_small_and_named_where_not() -> None:
    small = plan_training(find("llama-3.1-70b-instruct"), declared(gpu="A100-40G", ram_bytes=512 * GIB))
    assert (small.precision, small.offload_param, small.zero_stage) == ("nf4", True, 3)
    large = plan_training(find("llama-3.1-70b-instruct"), H100S)
    assert "CPUオフロード: 必須" in reasons(large, "offload_param")


def test_the_deepspeed_json_is_had_at_the_stage_where_it_works() -> None:
    wishes = {"zero_stage": 2, "offload_optimizer": True, "offload_param": True}
    plan = plan_training(find("qwen2.5-14b-instruct"), H100S, method="lora", overrides=wishes)
    assert any(w.startswith("offload_param has no effect at ZeRO stage 2") for w in plan.warnings)
    section = zero_optimization(
        stage=plan.zero_stage, offload_optimizer=plan.offload_optimizer, offload_param=plan.offload_param
    )
    assert section == DEEPSPEED_SECTION


def test_plain_data_parallelism_is_ddp() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), H100S)
    assert (plan.strategy, plan.num_workers) == ("ddp", 8)
