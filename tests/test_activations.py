"""What autograd keeps of small models of each architecture, trained as a worker trains them, is counted anew."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.child import run_module
from benchmarks.memory import planned_bytes
from benchmarks.memory_run import MemorySettings
from cluster.activations import Pass, activation_bytes, cpu_pass_tokens, layer_bytes
from cluster.catalog import find
from cluster.model_card import ModelCard
from cluster.presets import DType, lora_preset
from train_jobs.allocator import WORKER_ENV

BATCH, LENGTH = 2, 64
ARCHITECTURES = {  # by a model of the catalog with such layers
    "llama": ("smollm2-135m-instruct", "LlamaForCausalLM"),
    "mistral": ("smollm2-135m-instruct", "MistralForCausalLM"),
    "qwen2": ("qwen2.5-14b-instruct", "Qwen2ForCausalLM"),
    "qwen3": ("smollm2-135m-instruct", "Qwen3ForCausalLM"),
    "stablelm": ("japanese-stablelm-3b-4e1t-instruct", "StableLmForCausalLM"),
    "phimoe": ("phi-3.5-moe-instruct", "PhimoeForCausalLM"),
    "gpt2": ("japanese-gpt2-small", "GPT2LMHeadModel"),
}
TRAINED = ("full", "lora", "lora+dropout", "attention")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def small(architecture: str, num_layers: int) -> ModelCard:
    name, class_name = ARCHITECTURES[architecture]
    return replace(
        find(name),
        architecture=class_name,
        vocab_size=64,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8 if architecture == "gpt2" else 4,
        head_dim=32,
        max_position_embeddings=128,
    )


def one_pass(card: ModelCard, trained: str, dtype: DType, *, checkpointing: bool = False) -> Pass:
    targets = tuple(t for t in card.target_modules if trained != "attention" or t in ("q_proj", "v_proj", "o_proj"))
    dropout = 0.1 if trained == "lora+dropout" else 0.0
    lora = replace(lora_preset(card), r=2, lora_dropout=dropout, target_modules=targets)
    return Pass(
        card=card,
        precision=PRECISIONS[dtype],  # type: ignore[arg-type]
        compute_dtype=dtype,
        lora=None if trained == "full" else lora,
        num_tokens=BATCH * LENGTH,
        has_deepspeed=False,
        gradient_checkpointing=checkpointing,
    )


def pack_of(one: Pass) -> Any:
    """Return the pack that trains what `one` says, as a worker builds it."""
    import torch
    from test_model_card import hub_config
    from transformers import AutoModelForCausalLM

    from cluster.models.adapter_spec import AdapterSpec
    from train_jobs.job import NO_ADAPTER, AdapterJob, TrainJob
    from train_jobs.pack import build_pack
    from train_jobs.strategy import accelerator_for
    from train_jobs.tokens import Sample

    model = AutoModelForCausalLM.from_config(hub_config(one.card), dtype=getattr(torch, one.compute_dtype))
    lora = one.lora
    spec = NO_ADAPTER
    if lora is not None:
        spec = AdapterSpec(r=2, lora_alpha=4, target_modules=lora.target_modules, lora_dropout=lora.lora_dropout)
    adapter = AdapterJob(
        spec=spec, seed=0, num_steps=2, learning_rate=1e-5, lr_scheduler_type="linear", num_warmup_steps=0
    )
    tokens = tuple(range(LENGTH))
    job = TrainJob(
        card=one.card,
        precision=one.precision,
        compute_dtype=one.compute_dtype,
        adapters=(adapter,),
        samples=[Sample(input_ids=tokens, labels=tokens)] * BATCH,
        held_out=(),
        questions=(),
        batch_size=BATCH,
        gradient_accumulation_steps=1,
        gradient_checkpointing=one.gradient_checkpointing,
        deepspeed_zero=None,
        checkpoint_steps=2,
        num_threads=1,
    )
    return build_pack(job, model, accelerator_for(job))


def kept_bytes(one: Pass) -> int:
    import torch

    from train_jobs.batches import collate

    pack = pack_of(one)
    pack.module.train()
    weights = {t.untyped_storage().data_ptr() for t in (*pack.module.parameters(), *pack.module.buffers())}
    alive: list[torch.Tensor] = []
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    batch = collate([list(pack.job.samples)], device=torch.device("cpu"))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, pack.routed(batch, [0], dropout_keys=[1] * BATCH):
        pack.module(batch)
    return sum(sizes.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("trained", TRAINED)
def test_two_more_layers_keep_what_the_formula_says(architecture: str, dtype: DType, trained: str) -> None:
    if trained == "attention" and architecture == "gpt2":
        pytest.skip("c_proj is the name of two of its linears")
    passes = [one_pass(small(architecture, n), trained, dtype) for n in (1, 3)]
    counted = kept_bytes(passes[1]) - kept_bytes(passes[0])
    # a router's first and last numbers are in the formula only nearly
    assert 2 * layer_bytes(passes[0]) * BATCH * LENGTH == pytest.approx(counted, rel=0.002)


def test_every_architecture_is_counted() -> None:
    from cluster.architectures import ARCHITECTURES as ALL

    assert {name for _, name in ARCHITECTURES.values()} == set(ALL)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_checkpointing_keeps_the_input_of_each_layer(dtype: DType) -> None:
    passes = [one_pass(small("llama", n), "lora+dropout", dtype, checkpointing=True) for n in (1, 3)]
    counted = kept_bytes(passes[1]) - kept_bytes(passes[0])
    assert activation_bytes(passes[1]) - activation_bytes(passes[0]) == counted
    # two inputs of 256 values
    assert counted == 2 * 256 * passes[0].value_bytes * BATCH * LENGTH


def step_peak_bytes(one: Pass) -> int:
    """Return the most that torch's allocator holds at once in a step, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    from train_jobs.step import train_step

    pack = pack_of(one)
    train_step(pack, {0: 0})  # the optimizer's state stays
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train_step(pack, {0: 1})
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def planned_peak_bytes(one: Pass) -> int:
    """Return what is planned for it: activations, and few logits."""
    return activation_bytes(one) + one.num_tokens * one.card.vocab_size * 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_step_holds_what_is_planned_and_never_more(architecture: str, dtype: DType) -> None:
    one = one_pass(small(architecture, 8), "lora+dropout", dtype)
    assert 0.85 <= step_peak_bytes(one) / planned_peak_bytes(one) <= 1


@pytest.mark.parametrize(("trained", "checkpointing"), [("lora", False), ("lora", True), ("lora+dropout", True)])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_other_ways_to_train_hold_no_more_than_is_planned(trained: str, checkpointing: bool, dtype: DType) -> None:
    one = one_pass(small("llama", 8), trained, dtype, checkpointing=checkpointing)
    assert 0.8 <= step_peak_bytes(one) / planned_peak_bytes(one) <= 1


def test_activations_of_smollm2_by_hand() -> None:
    card = find("smollm2-135m-instruct")
    one = Pass(
        card=card,
        precision="fp32",
        compute_dtype="float32",
        lora=lora_preset(card),
        num_tokens=512,
        has_deepspeed=False,
        gradient_checkpointing=False,
    )
    # outputs of two norms, queries, attended and joined; keys and values; gate and up
    values = 5 * 576 + 2 * 192 + 2 * 1536
    # dropout on seven inputs; between A and B of rank 8; a number per norm and head
    assert layer_bytes(one) == 4 * values + (6 * 576 + 1536) + 4 * (7 * 8 + 2 + 9)
    # the last hidden states normed, chosen and their gradient; four tensors of the MLP's width
    beside = 4 * (3 * 576 + 4 * 1536)
    assert activation_bytes(one) == 512 * (30 * layer_bytes(one) + beside)
    quantized = replace(one, precision="nf4")  # keeps the product of gate and up, and one factor
    assert layer_bytes(quantized) - layer_bytes(one) == 4 * 2 * 1536
    under_deepspeed = replace(one, has_deepspeed=True)  # transformers' own norms keep their inputs, too
    assert layer_bytes(under_deepspeed) - layer_bytes(quantized) == 4 * 2 * 576


@pytest.mark.parametrize(
    ("micro", "length", "tokens"),
    # passes of one sample, of three, of two or shorter ones, of two, never less than a sample, all at once
    [(4, 512, 512), (8, 128, 384), (3, 129, 384), (5, 200, 400), (2, 1024, 1024), (2, 100, 200)],
)
def test_the_largest_pass_of_a_micro_batch_on_a_cpu(micro: int, length: int, tokens: int) -> None:
    assert cpu_pass_tokens(micro_batch_size=micro, max_length=length) == tokens


@pytest.mark.usefixtures("smollm2")
def test_a_worker_is_as_large_as_the_plan_says(tmp_path: Path) -> None:
    settings = MemorySettings(
        method="lora", precision="fp32", micro_batch_size=1, max_length=512, gradient_accumulation_steps=1
    )
    environment = WORKER_ENV | {"PYTHONWARNINGS": "ignore", "TMPDIR": str(tmp_path)}
    taken = run_module("benchmarks.memory_run", json.dumps(asdict(settings)), environment=environment)
    assert planned_bytes(settings) == pytest.approx(taken["training"], rel=0.1)
    assert taken["loading"] < taken["training"]
