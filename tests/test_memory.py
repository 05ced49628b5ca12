from dataclasses import replace

import pytest
from by_hand import FACTS

from cluster.catalog import find
from cluster.memory import (
    GIB,
    MemoryItem,
    MemoryTable,
    dequantized_linear_bytes,
    forward_bytes,
    gathered_cache_bytes,
    kv_cache_bytes,
    logits_bytes,
    num_lora_parameters,
    weights_bytes,
    whole_blocks,
)


@pytest.mark.parametrize("name", FACTS)
def test_weights_are_those_of_the_fact_sheet(name: str) -> None:
    card, facts = find(name), FACTS[name]
    step = 0.06 if facts.bf16_gb > 1 else 0.006
    assert weights_bytes(card, "bf16") / 1e9 == pytest.approx(facts.bf16_gb, abs=step)
    assert weights_bytes(card, "fp32") == 2 * weights_bytes(card, "bf16") == 4 * facts.params
    assert weights_bytes(card, "int8") / 1e9 == pytest.approx(facts.weights("int8", 2) / 1e9, abs=1e-6)
    assert weights_bytes(card, "nf4") / 1e9 == pytest.approx(facts.weights("nf4", 2) / 1e9, abs=1e-6)
    if not card.num_local_experts:  # the sheet quantizes PhiMoE's experts, which transformers does not
        assert weights_bytes(card, "int8") / 1e9 == pytest.approx(facts.int8_gb, abs=step)
        assert weights_bytes(card, "nf4") / 1e9 == pytest.approx(facts.nf4_gb, abs=step)


def test_unquantized_parts_follow_the_compute_dtype() -> None:
    # Qwen 14B: 14,770,033,664 - 13,212,057,600 = 1,557,976,064 values outside the linears, 2 bytes more each
    card = find("qwen2.5-14b-instruct")
    assert weights_bytes(card, "nf4", "float32") - weights_bytes(card, "nf4", "float16") == 2 * 1_557_976_064


def test_a_gptq_checkpoint_has_scales_and_zeros_by_group() -> None:
    # ELYZA: 6,476,005,376 weights at half a byte, and 2.5 bytes for each 128 of them; 262,410,240 values in 16 bit
    expected = 6_476_005_376 // 2 + 2.5 * 6_476_005_376 / 128 + 2 * 262_410_240
    card = replace(find("elyza-japanese-llama-2-7b-instruct"), checkpoint_bits=4, checkpoint_group_size=128)
    assert weights_bytes(card, "gptq") == weights_bytes(card, "awq") == expected


@pytest.mark.parametrize("name", FACTS)
def test_a_token_of_cache_is_that_of_the_fact_sheet(name: str) -> None:
    assert kv_cache_bytes(find(name), num_tokens=1) == FACTS[name].kv_kib * 1024


def test_calm3_caches_4096_tokens_in_four_and_a_half_gib() -> None:
    # 2 x 48 layers x 48 kv heads x 128 x 2 bytes = 1152 KiB a token: full multi-head attention is dear
    assert kv_cache_bytes(find("calm3-22b-chat"), num_tokens=4096) == 4.5 * GIB


def test_a_sequence_occupies_whole_blocks() -> None:
    assert [whole_blocks(n, 16) for n in (1, 16, 17, 4096)] == [16, 16, 32, 4096]


def test_lora_on_all_linears_of_smollm2() -> None:
    # a layer: q 576+576, k and v 576+192 twice, o 576+576, gate, up and down 576+1536 three times = 10,176
    assert num_lora_parameters(find("smollm2-135m-instruct"), r=8) == 8 * 10_176 * 30


def test_lora_counts_like_peft() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from test_model_card import hub_config
    from transformers import AutoModelForCausalLM

    for name in ("smollm2-135m-instruct", "japanese-gpt2-small", "phi-3.5-moe-instruct"):
        card = find(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hub_config(card))
            peft = get_peft_model(
                model,
                LoraConfig(
                    r=8,
                    target_modules=list(card.target_modules),
                    task_type="CAUSAL_LM",
                    fan_in_fan_out=name == "japanese-gpt2-small",
                ),
            )
        trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        assert num_lora_parameters(card, r=8) == trained, name


def test_lora_on_some_linears() -> None:
    card = find("smollm2-135m-instruct")
    assert num_lora_parameters(card, r=4, target_modules=("q_proj", "v_proj")) == 4 * (1152 + 768) * 30


def test_logits_of_smollm2() -> None:
    # 4 x 512 tokens x 49152 x 4 bytes = 403 MB a copy
    assert logits_bytes(find("smollm2-135m-instruct"), num_tokens=2048, copies=1) == 402_653_184


def test_one_linear_is_unpacked_at_a_time() -> None:
    card = find("llama-3.1-70b-instruct")
    assert dequantized_linear_bytes(card, "nf4", "float16") == 8192 * 28672 * 2
    assert dequantized_linear_bytes(card, "bf16", "bfloat16") == 0


def test_a_forward_pass_runs_each_token_through_its_experts() -> None:
    assert forward_bytes(find("smollm2-135m-instruct"), num_tokens=10, compute_dtype="float32") == 10 * 4 * 6912
    # 4 x 4096 + 3 x 6400 x 2 experts
    assert forward_bytes(find("phi-3.5-moe-instruct"), num_tokens=1, compute_dtype="bfloat16") == 2 * 54_784


def test_the_gathered_cache_is_what_transformers_reserves_for_it() -> None:
    import torch
    from test_model_card import hub_config
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

    card = find("smollm2-135m-instruct")
    batch, cached = 512, 32768
    handler = PagedAttentionMemoryHandler.__new__(PagedAttentionMemoryHandler)
    handler.config, handler.activation_dtype = hub_config(card), torch.float32
    handler.kv_heads_at_peak = 2 * card.num_attention_heads + card.num_key_value_heads
    handler.num_attention_masks = handler.io_multiplier = handler.num_groups = 1
    handler.tokens_per_sector = 1
    index_bytes = 8 * cached
    theirs = cached * handler.bytes_per_cache_token - index_bytes + handler.attention_mask_bytes(batch, cached)
    theirs += batch * handler.kv_heads_at_peak * card.head_dim * 4
    ours = gathered_cache_bytes(card, batch_tokens=batch, cached_tokens=cached, compute_dtype="float32")
    assert ours == theirs


def test_a_table_adds_up() -> None:
    items = (MemoryItem(name="a", num_bytes=GIB, formula=""), MemoryItem(name="b", num_bytes=2 * GIB, formula=""))
    table = MemoryTable(device="RAM", items=items, available_bytes=3 * GIB)
    assert (table.total_bytes, table.fits, table.num_bytes("b"), table.num_bytes("c")) == (3 * GIB, True, 2 * GIB, 0)
    assert table.as_sum() == "3.0 GiB (a 1.0, b 2.0)"
    assert not MemoryTable(device="RAM", items=items, available_bytes=3 * GIB - 1).fits


def test_rounded_parts_add_up_to_the_rounded_sum() -> None:
    def table(*gib: float) -> MemoryTable:
        items = tuple(MemoryItem(name=str(n), num_bytes=int(x * GIB), formula="") for n, x in enumerate(gib))
        return MemoryTable(device="RAM", items=items, available_bytes=GIB)

    # 0.16 + 0.16 + 0.16 = 0.48: tenths to the nearest are 2 + 2 + 2, the sum is 5
    assert table(0.16, 0.16, 0.16).rounded(10) == [1, 2, 2]
    assert table(0.14, 0.14, 0.14).rounded(10) == [2, 1, 1]
    assert table(0.1, 0.25, 3.0).rounded(100) == [10, 25, 300]
