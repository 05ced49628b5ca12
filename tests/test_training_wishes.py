from dataclasses import fields

import pytest

from cluster.catalog import find
from cluster.training_wishes import OVERRIDES, BadOverride, TrainingWishes, read_wishes

CARD = find("smollm2-135m-instruct")


def read(**overrides: object) -> TrainingWishes:
    return read_wishes(CARD, overrides, method=None, precision=None, max_length=None, num_workers=None)


def test_every_override_is_a_field() -> None:
    named = {field.name for field in fields(TrainingWishes)}
    assert named - set(OVERRIDES) == {"method", "precision", "max_length", "num_workers"}
    assert set(OVERRIDES) < named


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("r", "16", 16),
        ("r", 16, 16),
        ("learning_rate", "3e-4", 3e-4),
        ("lora_dropout", 0, 0.0),
        ("warmup_ratio", "0.05", 0.05),
        ("target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("target_modules", ["q_proj"], ("q_proj",)),
        ("gradient_checkpointing", "true", True),
        ("gradient_checkpointing", "No", False),
        ("offload_param", False, False),
        ("strategy", "deepspeed", "deepspeed"),
        ("lr_scheduler_type", "cosine", "cosine"),
    ],
)
def test_values_are_read_from_text_and_from_python(name: str, text: object, value: object) -> None:
    assert getattr(read(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("r", "0", "a whole number from 1 to 512"),
        ("r", 513, "a whole number from 1 to 512"),
        ("r", 1.5, "a whole number"),
        ("r", True, "a whole number"),
        ("r", "many", "a number"),
        ("micro_batch_size", 0, "a whole number of at least 1"),
        ("learning_rate", 0, "a number above 0, below 1"),
        ("learning_rate", "nan", "a number above 0, below 1"),
        ("learning_rate", None, "a number above 0, below 1"),
        ("lora_dropout", 1.0, "a number from 0, below 1"),
        ("gradient_checkpointing", "maybe", "true or false"),
        ("target_modules", "", "one or more module names"),
        ("target_modules", 7, "one or more module names"),
        ("strategy", "pipeline", "one of ddp, deepspeed, fsdp, dp"),
        ("lr_scheduler_type", "step", "one of linear, cosine, constant_with_warmup"),
        ("zero_stage", 4, "a whole number from 0 to 3"),
    ],
)
def test_values_that_cannot_be_say_what_could(name: str, value: object, words: str) -> None:
    with pytest.raises(BadOverride) as caught:
        read(**{name: value})
    assert f"{name}={value!r} is not {words}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio exclude each other"),
        (
            {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "effective_batch_size": 1},
            "two fix the third",
        ),
        ({"target_modules": "c_attn"}, "target_modules c_attn cannot carry LoRA in LlamaForCausalLM"),
    ],
)
def test_wishes_that_contradict_each_other(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(BadOverride, match=words):
        read(**overrides)


def test_lengths_and_workers_have_bounds() -> None:
    with pytest.raises(BadOverride, match=r"max_length=8193 is not from 1 to 8192; num_workers=0 is not positive"):
        read_wishes(CARD, {}, method=None, precision=None, max_length=8193, num_workers=0)
