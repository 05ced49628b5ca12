"""Methods and precisions that go together, and those that are refused before anything is loaded."""

import pytest

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import BadOverride, ImpossibleCombination, plan_training

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
    sharded = {"loraplus_lr_ratio": "16", "strategy": "fsdp"}
    assert plan_training(find(MODEL), h100s, method="lora", overrides=sharded).strategy == "fsdp"
    with pytest.raises(ImpossibleCombination, match=r"loraplus_lr_ratio .*strategy=ddp, or strategy=fsdp"):
        plan_training(find(MODEL), h100s, overrides={"loraplus_lr_ratio": "16", "zero_stage": "2"})


def test_regularization_is_transformers_own_until_it_is_said() -> None:
    h100 = declared(gpu="H100")
    plain = plan_training(find(MODEL), h100).regularization
    assert (plain.weight_decay, plain.max_grad_norm, plain.neftune_noise_alpha) == (0.0, 1.0, 0.0)
    wishes = {"weight_decay": "0.1", "max_grad_norm": "0.3", "neftune_noise_alpha": "5"}
    plan = plan_training(find(MODEL), h100, overrides=wishes)
    said = plan.regularization
    assert (said.weight_decay, said.max_grad_norm, said.neftune_noise_alpha) == (0.1, 0.3, 5.0)
    assert {d.source for d in plan.decisions if d.field in wishes} == {"user"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": "true"}, "use_dora is refused: vLLM serves no DoRA adapters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is refused: PiSSA, OLoRA and LoftQ change the base"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is refused: .* method 'full' trains them"),
        ({"max_grad_norm": "0"}, "max_grad_norm='0' is not a number above 0"),
        ({"weight_decay": "-0.1"}, "weight_decay='-0.1' is not a number from 0, below 1"),
    ],
)
def test_what_no_engine_could_serve_is_refused_by_name(setting: dict[str, object], message: str) -> None:
    with pytest.raises(BadOverride, match=message):
        plan_training(find(MODEL), declared(gpu="H100"), overrides=setting)
