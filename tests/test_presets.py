from dataclasses import asdict, replace

import pytest

from cluster import presets, traps
from cluster.catalog import find
from cluster.catalog_rows import ROWS
from cluster.model_card import ModelCard, Precision


def test_quantization_rules_are_the_specifications() -> None:
    assert {name: asdict(rule) for name, rule in presets.QUANTIZATION_RULES.items()} == {
        "32B+": {"bits": 4, "method": "bnb", "compute_dtype": "float16"},
        "20B-32B": {"bits": 8, "method": "bnb", "compute_dtype": "bfloat16"},
        "7B-20B": {"bits": 8, "method": "auto-gptq", "compute_dtype": "float16"},
        "<7B": {"bits": None, "method": None, "compute_dtype": "float32"},
    }
    loaded = {name: rule.precision for name, rule in presets.QUANTIZATION_RULES.items()}
    assert loaded == {"32B+": "nf4", "20B-32B": "int8", "7B-20B": "int8", "<7B": "fp32"}


def test_every_model_is_in_the_size_class_that_its_name_says() -> None:
    assert {card.name: presets.size_class(card) for card in ROWS} == {
        "smollm2-135m-instruct": "<7B",
        "qwen2.5-14b-instruct": "7B-20B",
        "qwen2.5-32b-instruct": "32B+",  # trap 8: 32 B is in two rows of the table, the larger holds
        "calm3-22b-chat": "20B-32B",
        "deepseek-r1-distill-qwen-32b-japanese": "32B+",
        "elyza-japanese-llama-2-7b-instruct": "7B-20B",  # 6.74e9 parameters, called 7B
        "japanese-gpt2-small": "<7B",
        "japanese-stablelm-3b-4e1t-instruct": "<7B",
        "llama-3.1-70b-instruct": "32B+",
        "phi-3.5-moe-instruct": "32B+",  # 41.9e9 with all experts, which is what memory holds
    }


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    # ELYZA's layer has 202,383,360 parameters, and 262,148,096 lie outside of the layers
    [(30, "<7B"), (31, "<7B"), (32, "7B-20B"), (95, "7B-20B"), (96, "20B-32B"), (154, "20B-32B"), (155, "32B+")],
)
def test_classes_meet_at_whole_billions_after_rounding(num_layers: int, expected: str) -> None:
    card = replace(find("elyza-japanese-llama-2-7b-instruct"), num_hidden_layers=num_layers)
    billions = (num_layers * 202_383_360 + 262_148_096) / 1e9  # 6.33, 6.54 and 19.49, 19.69 and 31.43, 31.63
    assert round(billions) == presets.nominal_billions(card)
    assert presets.size_class(card) == ("7B-20B" if num_layers == 31 else expected)


def test_lora_presets_are_the_specifications() -> None:
    rows = {
        name: (p.r, p.lora_alpha, p.lora_dropout, p.gradient_checkpointing, p.gradient_accumulation_steps)
        for name, p in presets.LORA_PRESETS.items()
    }
    assert rows.pop("standard")[:3] == (16, 32, 0.1)
    assert rows == {
        "large": (32, 64, 0.05, True, 8),
        "medium": (16, 32, 0.1, False, 4),
        "small": (8, 16, 0.1, False, 2),
    }
    standard = presets.LORA_PRESETS["standard"]
    assert standard.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (standard.bias, standard.task_type, standard.use_rslora) == ("none", "CAUSAL_LM", False)
    assert (presets.RANKS.start, presets.RANKS.stop - 1) == (4, 64)


@pytest.mark.parametrize(
    ("name", "rank"),
    [("calm3-22b-chat", 32), ("qwen2.5-32b-instruct", 32), ("qwen2.5-14b-instruct", 16), ("smollm2-135m-instruct", 8)],
)
def test_the_lora_preset_follows_the_size(name: str, rank: int) -> None:
    assert presets.lora_preset(find(name)).r == rank


def test_a_named_preset_keeps_the_models_own_linears() -> None:
    lora = presets.lora_preset(find("japanese-gpt2-small"), "standard")
    assert (lora.r, lora.target_modules) == (16, ("c_attn", "c_proj", "c_fc"))


def test_presets_are_what_peft_takes() -> None:
    from peft import LoraConfig

    lora = presets.lora_preset(ROWS[0])
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type", "use_rslora")
    config = LoraConfig(**{name: getattr(lora, name) for name in names})
    assert (config.r, config.lora_alpha, config.task_type) == (8, 16, "CAUSAL_LM")


def test_learning_rates_are_the_specifications() -> None:
    rows = {
        method: (p.learning_rate, p.lr_scheduler_type, p.warmup_ratio, p.warmup_steps)
        for method, p in presets.LEARNING_RATES.items()
    }
    assert rows == {
        "full": (5e-5, "cosine", 0.1, None),
        "lora": (2e-4, "linear", None, 500),
        "qlora": (1e-4, "constant_with_warmup", None, 100),
    }


def test_warm_up_is_a_share_of_a_full_run() -> None:
    assert presets.LEARNING_RATES["full"].clamp(200) == (20, None)


@pytest.mark.parametrize(("total", "steps"), [(10_000, 500), (5000, 500), (4999, 499), (200, 20), (9, 0)])
def test_warm_up_takes_at_most_a_tenth_of_a_run(total: int, steps: int) -> None:
    warmup, message = presets.LEARNING_RATES["lora"].clamp(total)
    assert warmup == steps
    assert (message is None) == (steps == 500)


def test_a_warm_up_longer_than_the_run_is_said() -> None:
    _, message = presets.LEARNING_RATES["lora"].clamp(200)
    assert (
        message == "warmup_steps 500 in a run of 200 steps would never reach the learning rate: shortened to 20 steps."
    )
    _, message = presets.LEARNING_RATES["qlora"].clamp(400)
    assert message is not None
    assert "hardly ever reach" in message


BATCHES = [  # 推奨バッチサイズ, row by row: float16, 8bit, 4bit
    ("llama-3.1-70b-instruct", 1, 2, 4),
    ("qwen2.5-32b-instruct", 2, 4, 8),
    ("calm3-22b-chat", 4, 8, 16),
    ("qwen2.5-14b-instruct", 8, 16, 32),
    ("elyza-japanese-llama-2-7b-instruct", 16, 32, 64),
    ("japanese-stablelm-3b-4e1t-instruct", 32, 64, 128),
    ("smollm2-135m-instruct", 32, 64, 128),  # smaller than every row: the nearest
    ("phi-3.5-moe-instruct", 2, 4, 8),  # 42 B is nearer to 32 than to 70
]


@pytest.mark.parametrize(("name", "half", "eight", "four"), BATCHES)
def test_the_first_batch_is_the_tables(name: str, half: int, eight: int, four: int) -> None:
    card = find(name)
    columns: dict[Precision, int] = {"fp16": half, "bf16": half, "fp32": half, "int8": eight, "nf4": four, "gptq": four}
    assert {p: presets.batch_size(card, p) for p in columns} == columns


@pytest.mark.parametrize(
    ("gb", "expected"),
    [
        (40.1, (True, True, True)),
        (40.0, (False, True, True)),
        (20.1, (False, True, True)),
        (20.0, (False, False, False)),
    ],
)
def test_offload_thresholds_are_the_specifications(gb: float, expected: tuple[bool, bool, bool]) -> None:
    rule = presets.offload_rule(gb)
    assert (rule.offload_layers, rule.offload_optimizer, rule.offload_gradients) == expected


def test_manual_4_bit_settings_reach_the_library() -> None:
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**presets.bitsandbytes_settings("nf4", "float16"))
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype is torch.float16
    assert config.bnb_4bit_use_double_quant


def test_manual_8_bit_settings_are_the_ones_that_exist() -> None:
    from transformers import BitsAndBytesConfig

    settings = presets.bitsandbytes_settings("int8", "bfloat16")
    assert BitsAndBytesConfig(**settings).load_in_8bit
    assert not set(settings) & set(traps.DEAD_8BIT_KNOBS)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "gptq"])
def test_nothing_else_is_quantized_at_load_time(precision: Precision) -> None:
    assert presets.bitsandbytes_settings(precision, "float16") == {}


DEEPSPEED_SECTION = {
    "stage": 3,  # 2 in the specification, where offload_param has no effect
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "offload_param": {"device": "cpu", "pin_memory": True},
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": 1e6,
}
"""`zero_optimization` of the specification's ds_config, typed from it."""


def test_the_deepspeed_section_is_the_specifications_at_stage_3() -> None:
    section = presets.zero_optimization(stage=3, offload_optimizer=True, offload_param=True)
    assert section == DEEPSPEED_SECTION


def test_the_specifications_offload_param_at_stage_2_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect at ZeRO stage 2"):
        presets.zero_optimization(stage=2, offload_optimizer=True, offload_param=True)


def test_no_offload_is_no_key() -> None:
    section = presets.zero_optimization(stage=2, offload_optimizer=False, offload_param=False)
    assert "offload_optimizer" not in section
    assert "offload_param" not in section


@pytest.mark.parametrize("card", ROWS, ids=lambda card: card.name)
def test_every_preset_has_only_linears_of_its_model(card: ModelCard) -> None:
    names = {linear.name.rpartition(".")[2] for linear in card.linears()}
    assert set(presets.lora_preset(card).target_modules) <= names
