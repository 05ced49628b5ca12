"""A serving plan in the words of vLLM and of Ray's placement of its workers."""

import math
from typing import Any

from cluster.memory import VALUE_BYTES, kv_cache_bytes
from cluster.plan import ServingPlan
from serve_apps.vllm_sampling import GRAMMAR_BACKEND

CPU_BLOCK_TOKENS = 32
"""Tokens of a cache block on a CPU: vLLM's 128 there would leave most of a short request's block empty."""
SPARE_BLOCKS = 2
"""vLLM keeps one block for itself, and a plan counts in blocks of 16 tokens."""

CPU_SPARE_LORAS = 1
"""vLLM 0.29's LoRA for CPUs (`lora/ops/torch_ops/lora_ops.py`) looks the adapter of a token up with -1 for the base,
which in PyTorch is the last slot: beside adapters, the base answers through it. Ours stays empty, which is all zeros,
because slots are filled from the front."""


def engine_kwargs(plan: ServingPlan) -> dict[str, Any]:
    """Return `plan` as fields of vLLM's `AsyncEngineArgs`."""
    kwargs: dict[str, Any] = {
        "dtype": plan.compute_dtype,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_batch_tokens,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "enable_prefix_caching": True,
        "structured_outputs_config": {"backend": GRAMMAR_BACKEND},
    }
    if plan.card.revision:
        kwargs["revision"] = plan.card.revision
    if plan.precision == "nf4":
        kwargs["quantization"] = "bitsandbytes"
    if plan.max_loras:
        num_slots = plan.max_loras + (CPU_SPARE_LORAS if plan.hardware.gpu is None else 0)
        kwargs |= {"enable_lora": True, "max_lora_rank": plan.max_lora_rank}
        kwargs |= {"max_loras": num_slots, "max_cpu_loras": num_slots}
    if plan.hardware.gpu is not None:
        return kwargs | {"gpu_memory_utilization": plan.gpu_memory_utilization}
    # Compiling for one CPU takes longer than it saves on models of this size.
    return kwargs | {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_TOKENS,
        "kv_cache_memory_bytes": _cpu_cache_bytes(plan),
    }


def _cpu_cache_bytes(plan: ServingPlan) -> int:
    blocks = math.ceil(plan.kv_cache_tokens / CPU_BLOCK_TOKENS) + SPARE_BLOCKS
    value_bytes = VALUE_BYTES[plan.compute_dtype]
    return kv_cache_bytes(plan.card, num_tokens=blocks * CPU_BLOCK_TOKENS, bytes_per_value=value_bytes)


def placement(plan: ServingPlan) -> dict[str, Any]:
    """Return the fields of Ray's `LLMConfig` that say where the workers run, and in which environment."""
    if plan.hardware.gpu is None:
        num_threads = max(1, plan.hardware.num_cpus // plan.replicas_per_node)
        # By itself vLLM keeps one core free and binds to the rest, every model of an application to the same ones.
        env_vars = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_threads)}
        return {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": 0}]},  # beside the CPU of the replica itself
            "runtime_env": {"env_vars": env_vars},
        }
    return {
        "accelerator_type": plan.hardware.gpu.name,
        "placement_group_config": {"bundle_per_worker": {"GPU": min(plan.num_gpus, 1.0)}},
    }
