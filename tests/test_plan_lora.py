"""Methods, precisions, learning rates and adapter settings of a training plan, and who decided."""

import pytest
from by_hand import GIB

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import ImpossibleCombination, TrainingPlan, plan_training

CPU = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)


def reason(plan: TrainingPlan, field: str) -> tuple[str, str]:
    decision = next(d for d in plan.decisions if d.field == field)
    return decision.source, decision.reason


@pytest.mark.parametrize(
    ("method", "rate", "scheduler", "warmup"),
    [("lora", 2e-4, "linear", 500), ("qlora", 1e-4, "constant_with_warmup", 100)],
)
def test_learning_rates_follow_the_method(method: str, rate: float, scheduler: str, warmup: int) -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, method=method)  # type: ignore[arg-type]  # a literal by parameter
    assert (plan.learning_rate, plan.lr_scheduler_type, plan.learning_rate_preset.warmup_steps) == (
        rate,
        scheduler,
        warmup,
    )


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, ("int8", "qlora", "model")),
        ({"method": "lora"}, ("bf16", "lora", "user")),
        ({"method": "qlora"}, ("int8", "qlora", "model")),
        ({"precision": "nf4"}, ("nf4", "qlora", "user")),
        ({"precision": "bf16"}, ("bf16", "lora", "user")),
        ({"method": "qlora", "precision": "nf4"}, ("nf4", "qlora", "user")),
    ],
)
def test_method_and_precision_decide_each_other(wishes: dict[str, str], expected: tuple[str, str, str]) -> None:
    plan = plan_training(find("qwen2.5-14b-instruct"), declared(gpu="H100"), **wishes)  # type: ignore[arg-type]
    assert (plan.precision, plan.method, reason(plan, "precision")[0]) == expected


def test_qlora_of_a_small_model_is_nf4() -> None:
    for hardware in (CPU, declared(gpu="L4")):
        plan = plan_training(find("smollm2-135m-instruct"), hardware, method="qlora")
        assert plan.precision == "nf4"
        assert not any("float32" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("method", "precision", "message"),
    [
        ("full", "nf4", "method 'full' needs unquantized weights, not nf4: use 'qlora'"),
        ("lora", "int8", "method 'lora' needs unquantized weights, not int8: use 'qlora'"),
        ("qlora", "bf16", "method 'qlora' trains on quantized weights, not bf16: use 'lora'"),
    ],
)
def test_methods_and_precisions_that_exclude_each_other(method: str, precision: str, message: str) -> None:
    with pytest.raises(ImpossibleCombination, match=message):
        plan_training(find("calm3-22b-chat"), declared(gpu="H100"), method=method, precision=precision)  # type: ignore[arg-type]


def test_lora_settings_are_the_users_where_given() -> None:
    wishes = {"r": "64", "lora_dropout": 0, "target_modules": "q_proj,v_proj", "use_rslora": "true"}
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides=wishes)
    assert plan.lora is not None
    assert (plan.lora.r, plan.lora.lora_alpha, plan.lora.lora_dropout) == (64, 128, 0.0)
    assert (plan.lora.target_modules, plan.lora.use_rslora) == (("q_proj", "v_proj"), True)
    assert reason(plan, "r")[0] == "user"
    assert reason(plan, "lora_alpha") == ("default", "twice the rank, as in every preset")


def test_the_standard_preset_can_be_asked_for() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides={"lora_preset": "standard"})
    assert plan.lora is not None
    assert (plan.lora.r, plan.lora.lora_alpha) == (16, 32)


@pytest.mark.parametrize(("r", "is_warned"), [(3, True), (4, False), (64, False), (65, True)])
def test_ranks_outside_of_the_specifications_are_warned_about(r: int, is_warned: bool) -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides={"r": r})
    assert any("outside the specification's 4 to 64" in w for w in plan.warnings) == is_warned
