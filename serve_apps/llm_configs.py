"""From a serving plan to Ray Serve LLM's description of a deployment."""

import math
from typing import Any

from ray.serve.llm import LLMConfig

from cluster.models.base import source_of
from cluster.plan import ServingPlan
from serve_apps.server import TransformersServer

GIB = 2**30


def llm_config_of(plan: ServingPlan, *, num_replicas: int = 1) -> LLMConfig:
    """Return the config of the deployment that carries out `plan`."""
    return (_vllm if plan.engine == "vllm" else _transformers)(plan, num_replicas)


def _transformers(plan: ServingPlan, num_replicas: int) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": plan.card.name},
        # Ray reads max_model_len for /v1/models; the rest of the plan goes to our server as it is.
        engine_kwargs={"max_model_len": plan.max_model_len, "plan": plan},
        server_cls=TransformersServer,
        deployment_config=_deployment(plan, num_replicas)
        | {"ray_actor_options": {"num_cpus": 1, "num_gpus": plan.num_gpus} | _placement(plan)},
    )


def _vllm(plan: ServingPlan, num_replicas: int) -> LLMConfig:
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
        hardware = {"accelerator_type": plan.hardware.gpu.name if plan.hardware.gpu else None}
    return LLMConfig(
        model_loading_config={"model_id": plan.card.name, "model_source": source_of(plan.card)},
        engine_kwargs=engine_kwargs,
        deployment_config=_deployment(plan, num_replicas),
        **hardware,
    )


def _kv_bytes_per_token(plan: ServingPlan) -> int:
    bytes_per_value = 4 if plan.compute_dtype == "float32" else 2
    return 2 * plan.card.num_hidden_layers * plan.card.num_key_value_heads * plan.card.head_dim * bytes_per_value


def _deployment(plan: ServingPlan, num_replicas: int) -> dict[str, Any]:
    return {
        "num_replicas": num_replicas,
        # Ray's default is 1e9, and Serve's 5 would starve the batch. Twice the batch keeps it full while answers end;
        # the rest waits in the ingress, where it can still go to another replica.
        "max_ongoing_requests": 2 * plan.max_num_seqs,
    }


def _placement(plan: ServingPlan) -> dict[str, Any]:
    return {"accelerator_type": plan.hardware.gpu.name} if plan.hardware.gpu and plan.num_gpus else {}
