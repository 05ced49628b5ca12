"""Methods and precisions that go together, and those that are refused before anything is loaded."""

import pytest

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import ImpossibleCombination, plan_training

MODEL = "smollm2-135m-instruct"


def test_full_fine_tuning_takes_fp32_where_there_is_no_bf16() -> None:
    assert plan_training(find(MODEL), declared(gpu="T4"), method="full").precision == "fp32"
    assert plan_training(find("qwen2.5-14b-instruct"), declared(gpu="H100", num_gpus=8), method="full").precision == (
        "bf16"
    )


@pytest.mark.parametrize(("gpu", "precision"), [("T4", "fp16"), ("T4", "bf16"), ("H100", "fp16")])
def test_full_fine_tuning_in_fp16_is_refused(gpu: str, precision: str) -> None:
    with pytest.raises(ImpossibleCombination, match="Full fine-tuning in fp16 loses small updates: use precision fp32"):
        plan_training(find(MODEL), declared(gpu=gpu), method="full", precision=precision)  # type: ignore[arg-type]


def test_lora_plus_under_deepspeed_is_refused_and_otherwise_planned() -> None:
    h100s = declared(gpu="H100", num_gpus=2)
    plan = plan_training(find(MODEL), h100s, overrides={"loraplus_lr_ratio": "16", "strategy": "ddp"})
    assert plan.lora is not None
    assert plan.lora.loraplus_lr_ratio == 16
    with pytest.raises(ImpossibleCombination, match="loraplus_lr_ratio is not proven under DeepSpeed"):
        plan_training(find(MODEL), h100s, overrides={"loraplus_lr_ratio": "16", "zero_stage": "2"})
