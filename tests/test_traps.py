"""Each trap of the specification, and the message that its user reads."""

from dataclasses import replace

import pytest

from cluster import traps
from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import DoesNotFit, ImpossibleCombination, plan_serving, plan_training
from cluster.presets import LEARNING_RATES

H100 = declared(gpu="H100")


@pytest.mark.parametrize("knob", ["bnb_8bit_compute_dtype", "bnb_8bit_use_double_quant"])
def test_trap_1_dead_8_bit_knobs_are_refused(knob: str) -> None:
    with pytest.raises(
        ImpossibleCombination, match=f"{knob}: BitsAndBytesConfig has no such setting.*llm_int8_threshold"
    ):
        traps.check_8bit_settings({"load_in_8bit": True, knob: False})
    traps.check_8bit_settings({"load_in_8bit": True, "llm_int8_threshold": 6.0})


def test_trap_1_the_library_really_swallows_them() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, bnb_8bit_compute_dtype="bfloat16")
    assert "bnb_8bit_compute_dtype" not in config.to_dict()


def test_trap_2_auto_gptq_becomes_int8_and_says_so() -> None:
    plan = plan_serving(find("elyza-japanese-llama-2-7b-instruct"), H100)
    assert plan.precision == "int8"
    assert any("GPTQ needs calibration data: it is a job" in warning for warning in plan.warnings)


def test_trap_2_a_gptq_checkpoint_is_loaded_as_it_is() -> None:
    card = replace(find("elyza-japanese-llama-2-7b-instruct"), checkpoint_quantization="gptq", checkpoint_bits=4)
    plan = plan_serving(card, H100)
    assert (plan.precision, plan.engine, plan.warnings) == ("gptq", "vllm", ())


def test_trap_2_gptq_is_no_switch_at_load_time() -> None:
    with pytest.raises(ImpossibleCombination, match=r"is no GPTQ checkpoint.*calibration data"):
        plan_serving(find("calm3-22b-chat"), H100, precision="gptq")


def test_trap_3_offloaded_parameters_lead_to_stage_3() -> None:
    wishes = {"zero_stage": 2, "offload_param": True, "offload_optimizer": True}
    plan = plan_training(find("qwen2.5-32b-instruct"), H100, overrides=wishes)
    assert (plan.zero_stage, plan.offload_param) == (3, True)
    assert any(w.startswith("offload_param has no effect at ZeRO stage 2") for w in plan.warnings)
    assert any("bnb_4bit_quant_storage equal to the model's dtype" in w for w in plan.warnings)


def test_trap_3_int8_drops_the_offload_of_parameters() -> None:
    plan = plan_training(find("qwen2.5-14b-instruct"), H100, overrides={"offload_param": True})
    assert not plan.offload_param
    assert any(w.startswith("offload_param is left out. ZeRO-3 cannot shard int8") for w in plan.warnings)


def test_trap_4_data_parallel_and_quantized_weights_exclude_each_other() -> None:
    with pytest.raises(ImpossibleCombination, match="DataParallel cannot copy quantized weights"):
        plan_training(find("qwen2.5-32b-instruct"), H100, overrides={"strategy": "dp"})


def test_trap_4_unquantized_data_parallel_becomes_ddp() -> None:
    h100s = declared(gpu="H100", num_gpus=2)
    plan = plan_training(find("smollm2-135m-instruct"), h100s, overrides={"strategy": "dp"})
    assert plan.strategy == "ddp"
    assert traps.DATA_PARALLEL_GPUS in plan.warnings


def test_trap_5_layers_on_the_cpu_stay_unquantized() -> None:
    # 855,638,016 weights a layer, 2 bytes each: 1.7 GB, 137 GB for 80 of them
    message = r"llm_int8_enable_fp32_cpu_offload=True.*unquantized: 1\.7 GB each.*137 GB for all 80"
    with pytest.raises(DoesNotFit, match=message):
        plan_serving(find("llama-3.1-70b-instruct"), declared(gpu="A10G"))


def test_trap_6_a_warm_up_that_never_ends_is_shortened() -> None:
    _, message = LEARNING_RATES["lora"].clamp(200)
    assert message is not None
    assert message.startswith("warmup_steps 500 in a run of 200 steps would never reach the learning rate")


def test_trap_7_the_batch_table_is_a_first_guess() -> None:
    plan = plan_training(find("calm3-22b-chat"), declared(gpu="A10G"))
    decision = next(d for d in plan.decisions if d.field == "micro_batch_size")
    assert decision.source == "memory"
    assert traps.BATCH_TABLE in decision.reason
    assert plan.effective_batch_size == 16 * 8  # the table's 22B row at 4 bit x the preset's accumulation


def test_trap_8_the_model_wins_over_the_size_rule_and_the_user_over_both() -> None:
    card = find("deepseek-r1-distill-qwen-32b-japanese")  # 32B+: 4 bit by size; 8bit推奨 of its own
    by_model, by_user = plan_serving(card, H100), plan_serving(card, H100, precision="nf4")
    by_size = plan_serving(replace(card, recommended_precision=None), H100)
    chosen = [
        next((d.value, d.source) for d in plan.decisions if d.field == "precision")
        for plan in (by_model, by_user, by_size)
    ]
    assert chosen == [("int8", "model"), ("nf4", "user"), ("nf4", "size rule")]


def test_trap_9_the_modelfile_template_fits_llama_2_only() -> None:
    assert traps.MODELFILE_TEMPLATE in traps.export_notes(find("qwen2.5-14b-instruct"))
    assert traps.MODELFILE_TEMPLATE not in traps.export_notes(find("elyza-japanese-llama-2-7b-instruct"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("japanese-gpt2-small", "not GPT2LMHeadModel, and llama.cpp's converter refuses it too"),
        ("japanese-stablelm-3b-4e1t-instruct", "not StableLmForCausalLM: convert to GGUF first"),
        ("phi-3.5-moe-instruct", "not PhimoeForCausalLM: convert to GGUF first"),
    ],
)
def test_trap_10_what_ollama_does_not_import(name: str, words: str) -> None:
    assert any(words in note for note in traps.export_notes(find(name)))


def test_trap_10_adapters_are_merged_unquantized_and_pushed_under_a_user() -> None:
    notes = " ".join(traps.export_notes(find("qwen2.5-14b-instruct")))
    assert "merged into the unquantized base" in notes
    assert "user/name" in notes
    assert "Ollama imports" not in notes


def test_trap_11_a_model_without_a_chat_template_is_told() -> None:
    card = replace(find("smollm2-135m-instruct"), has_tokenizer_chat_template=False)
    for plan in (plan_serving(card, H100), plan_training(card, H100)):
        assert any("apply_chat_template would raise: set chat_template in models.toml" in w for w in plan.warnings)
    assert not any("chat_template" in w for w in plan_serving(find("japanese-gpt2-small"), H100).warnings)


def test_quantizing_experts_saves_nothing_and_is_said() -> None:
    phi = find("phi-3.5-moe-instruct")
    # 41,873,153,344 - 32 layers x 41,943,040 attention weights = 40.53e9 x 2 bytes
    message = "81.1 of 83.7 GB would stay in 16 bit"
    assert message in traps.experts_stay_unquantized(phi)
    plan = plan_serving(phi, declared(gpu="H100", num_gpus=2))
    assert plan.precision == "bf16"
    assert message in next(d.reason for d in plan.decisions if d.field == "precision")
    by_user = plan_serving(phi, declared(gpu="H200"), precision="int8")
    assert by_user.precision == "int8"
    assert any(message in warning for warning in by_user.warnings)
