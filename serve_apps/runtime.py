"""What a replica of the transformers engine holds."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cluster.models.base import LoadedBase, load_base
from cluster.plan import ServingPlan
from cluster.registry import Registry
from serve_apps import short_thread
from serve_apps.adapters import AdapterSlots, BankLoader
from serve_apps.embeddings import Embedder
from serve_apps.engine import Engine, EngineLimits
from serve_apps.fused_layer import fuse_layers
from serve_apps.packed_linear import pack_linears
from serve_apps.replica_metrics import EngineMetrics, MeteredLoader
from serve_apps.requests import ModelLimits, default_sampling
from serve_apps.token_engine import TokenEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """The parts of a running replica."""

    engine: TokenEngine
    tokenizer: PreTrainedTokenizerBase
    adapters: AdapterSlots
    limits: ModelLimits
    embedder: Embedder | None = None
    """None where the engine does not let the model be used beside its batch."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def start_runtime(plan: ServingPlan) -> Runtime:
    """Load the model of `plan` and start its engine.

    Raises:
        UserError: the model cannot be had.
    """
    # Ray gives a replica as many threads as it reserves CPUs; a CPU replica computes on all that its node can spare.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // plan.replicas_per_node))
    base = short_thread.run(partial(_load, plan))
    limits = EngineLimits(
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_batch_tokens=plan.max_batch_tokens,
        kv_cache_tokens=plan.kv_cache_tokens,
    )
    engine = Engine(base.model, limits)
    engine.start()
    EngineMetrics(engine, plan.card.name).start()
    loader = BankLoader(
        engine=engine,
        max_loras=plan.max_loras,
        max_lora_rank=plan.max_lora_rank,
        target_modules=plan.card.target_modules,
    )
    slots = AdapterSlots(
        MeteredLoader(loader=loader, model=plan.card.name), plan.card, Registry.default(), max_loras=plan.max_loras
    )
    return Runtime(
        engine=engine,
        tokenizer=base.tokenizer,
        adapters=slots,
        limits=model_limits(plan, base.tokenizer, base.model.generation_config),
        embedder=Embedder(engine),
    )


def _load(plan: ServingPlan) -> LoadedBase:
    base = load_base(
        plan.card,
        precision=plan.precision,
        compute_dtype=getattr(torch, plan.compute_dtype),
        device="cuda" if plan.num_gpus else "cpu",
    )
    fuse_layers(base.model)
    pack_linears(base.model)
    return base


def model_limits(plan: ServingPlan, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> ModelLimits:
    """Return what bounds and completes every request to the model of `plan`, whose own recommendation is `config`."""
    declared = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = [*plan.card.stop_token_ids, *declared, tokenizer.eos_token_id]
    return ModelLimits(
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        vocab_size=plan.card.vocab_size,
        stop_token_ids=tuple(sorted({token for token in known if isinstance(token, int)})),
        defaults=default_sampling(config),
    )
