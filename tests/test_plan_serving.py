import json
import math

import pytest
from by_hand import FACTS, GIB, GPU_MIB, MIB, PRECISION, VLLM, serving_items

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import DoesNotFit, ImpossibleCombination, ServingPlan, plan_serving

RANK = {"large": 32, "medium": 16, "small": 8}
BY_SIZE = {
    "smollm2-135m-instruct": "small",
    "japanese-gpt2-small": "small",
    "japanese-stablelm-3b-4e1t-instruct": "small",
    "elyza-japanese-llama-2-7b-instruct": "medium",
    "qwen2.5-14b-instruct": "medium",
}
TIED = {"smollm2-135m-instruct", "japanese-gpt2-small"}
CPU = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)
DOES_NOT_FIT = {
    # one sequence of 512 tokens and no adapter, in GiB: 33.6 | 38.6 | 79.0; 0.92 of 22.5, 40 and 80 GiB is there
    "A10G": {"deepseek-r1-distill-qwen-32b-japanese", "llama-3.1-70b-instruct", "phi-3.5-moe-instruct"},
    "L4": {"deepseek-r1-distill-qwen-32b-japanese", "llama-3.1-70b-instruct", "phi-3.5-moe-instruct"},
    "A100-40G": {"llama-3.1-70b-instruct", "phi-3.5-moe-instruct"},
    "A100-80G": {"phi-3.5-moe-instruct"},
    "H100": {"phi-3.5-moe-instruct"},
}


def rank(name: str) -> int:
    return RANK[BY_SIZE.get(name, "large")]


def value_bytes(plan: ServingPlan) -> int:
    return 4 if plan.compute_dtype == "float32" else 2


def hand_sum(plan: ServingPlan, *, tokens: int, streams: int) -> dict[str, float]:
    return serving_items(
        plan.card.name,
        plan.precision,
        value_bytes(plan),
        split=plan.tensor_parallel_size,
        streams=streams,
        batch=plan.max_batch_tokens,
        tokens=tokens,
        loras=plan.max_loras,
        r=plan.max_lora_rank,
    )


def assert_matches_hand(plan: ServingPlan) -> None:
    by_hand = hand_sum(plan, tokens=plan.kv_cache_tokens, streams=plan.max_num_seqs)
    if plan.hardware.gpu is None and plan.card.name in TIED:
        by_hand["packed head"] = FACTS[plan.card.name].vocab * FACTS[plan.card.name].h * 4
    assert {item.name: item.num_bytes for item in plan.memory.items} == pytest.approx(by_hand, abs=64)
    assert plan.memory.total_bytes == pytest.approx(sum(by_hand.values()), abs=256)
    assert plan.memory.total_bytes <= plan.memory.available_bytes


@pytest.mark.parametrize("gpu", GPU_MIB)
@pytest.mark.parametrize("name", FACTS)
def test_every_model_on_every_gpu_against_sums_done_by_hand(name: str, gpu: str) -> None:
    available = 0.92 * GPU_MIB[gpu] * MIB
    precision, size = PRECISION[name]
    if name in DOES_NOT_FIT[gpu]:
        narrowest = serving_items(
            name, precision, size, split=1, streams=16, batch=2048, tokens=512, loras=0, r=rank(name)
        )
        need = sum(narrowest.values())
        assert need > available
        with pytest.raises(DoesNotFit) as caught:
            plan_serving(find(name), declared(gpu=gpu))
        message = str(caught.value)
        assert f"needs {need / GIB:.1f} GiB (weights {narrowest['weights'] / GIB:.1f}, KV cache" in message
        assert f"leaves {available / GIB:.1f} GiB of {gpu}" in message
        assert "It fits " in message
        return
    plan = plan_serving(find(name), declared(gpu=gpu))
    assert (plan.precision, plan.engine) == (precision, "vllm" if name in VLLM else "transformers")
    assert (value_bytes(plan), plan.tensor_parallel_size, plan.max_lora_rank) == (size, 1, rank(name))
    assert_matches_hand(plan)
    assert plan.max_model_len == min(4096, find(name).max_position_embeddings)
    block = 16 if plan.engine == "vllm" else 256
    sequence = math.ceil(plan.max_model_len / block) * block
    assert plan.max_num_seqs == min(16, plan.kv_cache_tokens // sequence)
    if plan.max_num_seqs < 16:  # as many as fit, and not one block more
        more = hand_sum(plan, tokens=plan.kv_cache_tokens + block, streams=16)
        assert sum(more.values()) > available
    shares = math.ceil(plan.memory.total_bytes * 8 / available)
    if shares <= 4:
        assert (plan.num_gpus, plan.replicas_per_node) == (shares / 8, 8 // shares)
        assert plan.gpu_memory_utilization == pytest.approx(0.92 * shares / 8, abs=1e-4)
    else:
        assert (plan.num_gpus, plan.replicas_per_node, plan.gpu_memory_utilization) == (1, 1, 0.92)


def test_qwen_14b_on_an_a10g_in_numbers() -> None:
    plan = plan_serving(find("qwen2.5-14b-instruct"), declared(gpu="A10G"))
    # int8: 13,212,057,600 weights + 4 x 2,162,688 rows, and 1,557,976,064 others in 16 bit = 16,336,660,480
    assert plan.memory.num_bytes("weights") == 13_212_057_600 + 4 * 2_162_688 + 2 * 1_557_976_064
    # a token: 2 x 48 layers x 8 heads x 128 x 2 bytes = 192 KiB
    assert plan.memory.num_bytes("KV cache") == plan.kv_cache_tokens * 192 * 1024
    assert plan.memory.available_bytes == int(0.92 * 23028 * MIB)
    # 4 sequences of 4096 with 4 adapters; 5 of them, or 8 adapters, are above 20.69 GiB
    assert (plan.max_num_seqs, plan.max_loras) == (4, 4)


PLANNED_ON_THE_CPU = {
    # precision, context, streams: 0.8 x 24 GiB = 19.2 GiB, everything that computes in fp32
    "smollm2-135m-instruct": ("fp32", 2048, 16),  # 0.5 + 16 x 2048 x 45 KiB = 1.4
    "calm3-22b-chat": ("nf4", 1024, 1),  # 13.4 + 1024 x 2304 KiB = 2.25 for each sequence
    "elyza-japanese-llama-2-7b-instruct": ("int8", 2048, 4),  # fp32 alone would be 25.1; 7.0 + 2 GiB a sequence
    "japanese-gpt2-small": ("fp32", 1024, 16),
    "japanese-stablelm-3b-4e1t-instruct": ("fp32", 2048, 5),  # 10.4 + 1.25 GiB a sequence
}


@pytest.mark.parametrize("name", PLANNED_ON_THE_CPU)
def test_what_fits_on_a_cpu_computes_in_fp32(name: str) -> None:
    plan = plan_serving(find(name), CPU)
    assert (plan.precision, plan.max_model_len, plan.max_num_seqs) == PLANNED_ON_THE_CPU[name]
    assert (plan.engine, plan.compute_dtype, plan.num_gpus, plan.replicas_per_node) == ("transformers", "float32", 0, 1)
    assert plan.memory.available_bytes == int(0.8 * 24 * GIB)
    assert_matches_hand(plan)


def test_a_tied_head_is_held_twice_on_a_cpu_only() -> None:
    # 49,152 tokens x 576 values x 4 bytes = 108 MiB
    name = "smollm2-135m-instruct"
    assert plan_serving(find(name), CPU).memory.num_bytes("packed head") == 108 * MIB
    assert plan_serving(find(name), declared(gpu="L4")).memory.num_bytes("packed head") == 0
    assert plan_serving(find(name), CPU, engine="vllm").memory.num_bytes("packed head") == 0
    assert plan_serving(find("elyza-japanese-llama-2-7b-instruct"), CPU).memory.num_bytes("packed head") == 0  # untied


@pytest.mark.parametrize("name", sorted(set(FACTS) - set(PLANNED_ON_THE_CPU)))
def test_what_does_not_fit_on_a_cpu(name: str) -> None:
    precision = "fp32" if name.startswith("phi") else PRECISION[name][0]
    need = serving_items(name, precision, 4, split=1, streams=16, batch=512, tokens=512, loras=0, r=rank(name))
    with pytest.raises(
        DoesNotFit, match=rf"at {precision} on engine 'transformers' needs .* leaves 19\.2 GiB of RAM"
    ) as e:
        plan_serving(find(name), CPU)
    assert f"needs {sum(need.values()) / GIB:.1f} GiB" in str(e.value)


def test_a_quantized_model_on_a_cpu_says_why_it_is_not_fp32() -> None:
    decision = plan_serving(find("calm3-22b-chat"), CPU).decisions[0]
    assert (decision.field, decision.source) == ("precision", "model")
    assert "4bit推奨" in decision.reason
    assert "fp32, the fast precision of a CPU, does not fit" in decision.reason


def test_llama_70b_is_split_over_the_smallest_power_of_two_that_fits() -> None:
    plan = plan_serving(find("llama-3.1-70b-instruct"), declared(gpu="A10G", num_gpus=8))
    # 36.8 GiB of weights: 18.4 on each of 2 leave room for one short sequence; 4 hold 4 streams of 4096
    assert (plan.tensor_parallel_size, plan.num_gpus, plan.replicas_per_node) == (4, 4, 2)
    assert_matches_hand(plan)


def test_the_split_divides_the_key_value_heads() -> None:
    # 8 kv heads of Phi: 4 x 22.5 GiB hold its 78 GiB, and 3 GPUs cannot be asked for
    plan = plan_serving(find("phi-3.5-moe-instruct"), declared(gpu="A10G", num_gpus=6))
    assert plan.tensor_parallel_size == 4
    assert plan.replicas_per_node == 1


def test_the_transformers_engine_stays_on_one_gpu() -> None:
    with pytest.raises(DoesNotFit):
        plan_serving(find("deepseek-r1-distill-qwen-32b-japanese"), declared(gpu="A10G", num_gpus=8))
    plan = plan_serving(find("deepseek-r1-distill-qwen-32b-japanese"), declared(gpu="A10G", num_gpus=8), engine="vllm")
    # vLLM has no int8 in flight: bf16 on 4 GPUs, 15.3 GiB each
    assert (plan.precision, plan.engine, plan.tensor_parallel_size) == ("bf16", "vllm", 4)


def test_replicas_multiply_over_the_gpus_of_a_node() -> None:
    plan = plan_serving(find("japanese-gpt2-small"), declared(gpu="A100-40G", num_gpus=4))
    assert (plan.num_gpus, plan.replicas_per_node) == (0.125, 32)


def test_the_users_context_and_streams_are_kept() -> None:
    plan = plan_serving(find("calm3-22b-chat"), declared(gpu="A100-40G"), max_model_len=8192, max_num_seqs=32)
    assert (plan.max_model_len, plan.max_num_seqs) == (8192, 32)
    # 9 GiB a sequence: two of them fit beside 11.9 GiB of weights and adapters
    assert "The cache holds 2 sequences of 8192 tokens at once; more wait until one is finished." in plan.warnings
    by_user = {d.field for d in plan.decisions if d.source == "user"}
    assert by_user == {"max_model_len", "max_num_seqs"}


def test_a_context_that_does_not_fit_offers_a_shorter_one() -> None:
    with pytest.raises(
        DoesNotFit, match=r"one sequence of 16384 tokens.*It fits with max_model_len 4096, or on 2 x A10G"
    ):
        plan_serving(find("calm3-22b-chat"), declared(gpu="A10G"), max_model_len=16384)


def test_a_precision_that_does_not_fit_offers_a_lighter_one() -> None:
    message = r"at bf16 .*It fits with precision 'int8', or on 2 x A10G, or on 1 x A100-40G\."
    with pytest.raises(DoesNotFit, match=message):
        plan_serving(find("qwen2.5-14b-instruct"), declared(gpu="A10G"), precision="bf16")


def test_adapters_that_do_not_fit_are_fewer_unless_asked_for() -> None:
    card, a10g = find("qwen2.5-32b-instruct"), declared(gpu="A10G")
    plan = plan_serving(card, a10g)
    assert plan.max_loras == 0
    assert "No adapter fits beside the model: this plan serves the base alone." in plan.warnings
    with pytest.raises(DoesNotFit, match=r"adapters 4\.0"):  # 8 x 268 M values x 2 bytes
        plan_serving(card, a10g, num_adapters=8)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_model_len": 4097}, r"max_model_len=4097 \(at most 4096, the model's own\)"),
        ({"max_model_len": 0}, r"max_model_len=0 \(at least 1\)"),
        ({"max_num_seqs": 0, "num_adapters": -1}, r"max_num_seqs=0 \(at least 1\), num_adapters=-1 \(at least 0\)"),
        ({"max_lora_rank": 513}, r"max_lora_rank=513 \(at most 512\)"),
    ],
)
def test_numbers_out_of_bounds_are_named_all_at_once(wishes: dict[str, int], message: str) -> None:
    with pytest.raises(ImpossibleCombination, match=message):
        plan_serving(find("elyza-japanese-llama-2-7b-instruct"), declared(gpu="H100"), **wishes)  # type: ignore[arg-type]


def test_a_checkpoint_that_bitsandbytes_has_quantized_is_not_split() -> None:
    from dataclasses import replace

    card = replace(find("qwen2.5-32b-instruct"), checkpoint_quantization="bitsandbytes", checkpoint_bits=4)
    plan = plan_serving(card, declared(gpu="A10G", num_gpus=4), num_adapters=0)
    assert (plan.precision, plan.tensor_parallel_size) == ("nf4", 1)
    with pytest.raises(ImpossibleCombination, match="published quantized with 'hqq'"):
        plan_serving(replace(card, checkpoint_quantization="hqq"), declared(gpu="H100"))
    with pytest.raises(ImpossibleCombination, match="published as nf4: it cannot be loaded as bf16"):
        plan_serving(card, declared(gpu="H100"), precision="bf16")


def test_a_plan_is_plain_json() -> None:
    plan = plan_serving(find("qwen2.5-14b-instruct"), declared(gpu="A10G"))
    record = plan.to_json()
    assert json.loads(json.dumps(record)) == record
    assert record["memory"]["total_bytes"] == sum(item["num_bytes"] for item in record["memory"]["items"])
    assert record["memory"]["fits"] is True
    assert record["card"]["name"] == "qwen2.5-14b-instruct"


def test_every_number_of_a_plan_has_its_reason() -> None:
    plan = plan_serving(find("qwen2.5-14b-instruct"), declared(gpu="A10G"))
    numbers = {
        "engine", "precision", "compute_dtype", "max_model_len", "max_num_seqs", "tensor_parallel_size", "num_gpus",
        "replicas_per_node", "gpu_memory_utilization", "max_lora_rank", "max_loras",
    }  # fmt: skip
    assert {d.field for d in plan.decisions} == numbers
    assert all(d.reason for d in plan.decisions)
