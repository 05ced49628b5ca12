"""From a serving plan to Ray Serve LLM's description of a deployment."""

import math
from typing import Any

from ray.serve.llm import LLMConfig

from cluster.models.base import source_of
from cluster.plan import ServingPlan
from serve_apps.args import ModelArgs
from serve_apps.scaling import deployment_options
from serve_apps.server import TransformersServer

GIB = 2**30


def llm_config_of(plan: ServingPlan, wish: ModelArgs) -> LLMConfig:
    """Return the config of the deployment that carries out `plan`, with as many replicas as `wish` says."""
    return (_vllm if plan.engine == "vllm" else _transformers)(plan, wish)


def _transformers(plan: ServingPlan, wish: ModelArgs) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": plan.card.name},
        # Ray reads max_model_len for /v1/models; the rest of the plan goes to our server as it is.
        engine_kwargs={"max_model_len": plan.max_model_len, "plan": plan},
        server_cls=TransformersServer,
        deployment_config=deployment_options(plan, wish)
        | {"ray_actor_options": {"num_cpus": 1, "num_gpus": plan.num_gpus} | _placement(plan)},
    )


def _vllm(plan: ServingPlan, wish: ModelArgs) -> LLMConfig:
    on_cpu = plan.hardware.gpu is None
    engine_kwargs: dict[str, Any] = {
        "dtype": plan.compute_dtype,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_batch_tokens,
        "tensor_parallel_size": plan.tensor_parallel_size,
    }
    if plan.card.revision:
        engine_kwargs["revision"] = plan.card.revision
    if plan.precision == "nf4":
        engine_kwargs["quantization"] = "bitsandbytes"
    if on_cpu:
        # Compiling for one CPU takes longer than it saves on models of this size.
        engine_kwargs["enforce_eager"] = True
        kv_cache_gib = math.ceil(plan.kv_cache_tokens * _kv_bytes_per_token(plan) / GIB)
        hardware: dict[str, Any] = {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": 1}]},
            "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}},
        }
    else:
        engine_kwargs["gpu_memory_utilization"] = plan.gpu_memory_utilization
        hardware = _placement(plan) | {
            "placement_group_config": {"bundle_per_worker": {"GPU": min(plan.num_gpus, 1.0)}}
        }
    return LLMConfig(
        model_loading_config={"model_id": plan.card.name, "model_source": source_of(plan.card)},
        engine_kwargs=engine_kwargs,
        deployment_config=deployment_options(plan, wish),
        **hardware,
    )


def _kv_bytes_per_token(plan: ServingPlan) -> int:
    bytes_per_value = 4 if plan.compute_dtype == "float32" else 2
    return 2 * plan.card.num_hidden_layers * plan.card.num_key_value_heads * plan.card.head_dim * bytes_per_value


def _placement(plan: ServingPlan) -> dict[str, Any]:
    return {"accelerator_type": plan.hardware.gpu.name} if plan.hardware.gpu and plan.num_gpus else {}
