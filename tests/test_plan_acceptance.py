from dataclasses import replace

import pytest
from by_hand import GIB

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import TrainingPlan, plan_training
from cluster.plan_acceptance import RESULT_RUNS_ON

CPU = declared(gpu=None, num_cpus=2, ram_bytes=64 * GIB)


def accepted(plan: TrainingPlan) -> tuple[str, str]:
    decision = next(d for d in plan.decisions if d.field == RESULT_RUNS_ON)
    return decision.value, decision.reason


def test_an_adapter_on_llama_runs_everywhere_and_on_gguf_once_merged() -> None:
    engines, reason = accepted(plan_training(find("smollm2-135m-instruct"), CPU))
    assert engines == "transformers, vllm, gguf"
    assert reason == "gguf once merged into the unquantized base"


@pytest.mark.parametrize(
    ("name", "engines", "words"),
    [
        ("japanese-gpt2-small", "transformers", "GPT2LMHeadModel takes no LoRA adapters; not gguf: llama.cpp"),
        ("japanese-stablelm-3b-4e1t-instruct", "transformers, gguf", "vLLM 0.29 does not have StableLmForCausalLM"),
    ],
)
def test_an_engine_that_will_not_take_it_is_named_with_the_reason(name: str, engines: str, words: str) -> None:
    found, reason = accepted(plan_training(find(name), CPU))
    assert found == engines
    assert words in reason


def test_a_whole_model_runs_where_its_class_is_known() -> None:
    # vLLM has GPT-2's class, only no LoRA on it
    assert accepted(plan_training(find("japanese-gpt2-small"), CPU, method="full"))[0] == "transformers, vllm"


def test_rslora_is_told_apart_from_what_a_gguf_adapter_can_say() -> None:
    plan = plan_training(find("smollm2-135m-instruct"), CPU, overrides={"use_rslora": True})
    assert "as a GGUF adapter it would be scaled by alpha / r" in accepted(plan)[1]


def test_a_rank_that_serving_has_no_room_for_is_warned_of() -> None:
    card = find("smollm2-135m-instruct")
    # below 7B the preset has rank 4, for which an engine is given room for 8
    at_most = plan_training(card, CPU, overrides={"r": 8})
    assert not any("max_lora_rank" in warning for warning in at_most.warnings)
    above = plan_training(card, CPU, overrides={"r": 40})
    assert any("r=40 is above the 8 " in w and "max_lora_rank: 64 in a Serve config" in w for w in above.warnings)


def test_weights_that_bitsandbytes_published_do_not_become_gguf() -> None:
    card = replace(find("smollm2-135m-instruct"), checkpoint_quantization="bitsandbytes", checkpoint_bits=4)
    engines, reason = accepted(plan_training(card, declared(gpu="L4"), method="qlora"))
    assert engines == "transformers, vllm"
    assert "bitsandbytes has quantized" in reason
