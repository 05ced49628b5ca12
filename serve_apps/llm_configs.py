"""From a serving plan to Ray Serve LLM's description of a deployment."""

from ray.serve.llm import LLMConfig

from cluster.models.base import source_of
from cluster.plan import ServingPlan
from serve_apps import vllm_args
from serve_apps.args import ModelArgs
from serve_apps.log import LOGGING_CONFIG
from serve_apps.replicas import transformers_options
from serve_apps.scaling import deployment_options
from serve_apps.server import TransformersServer


def llm_config_of(plan: ServingPlan, wish: ModelArgs) -> LLMConfig:
    """Return the config of the deployment that carries out `plan`, with as many replicas as `wish` says."""
    return (_vllm if plan.engine == "vllm" else _transformers)(plan, wish)


def _transformers(plan: ServingPlan, wish: ModelArgs) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": plan.card.name},
        # Ray reads max_model_len for /v1/models; the rest of the plan goes to our server as it is.
        engine_kwargs={"max_model_len": plan.max_model_len, "plan": plan},
        server_cls=TransformersServer,
        deployment_config=transformers_options(plan, wish),
    )


def _vllm(plan: ServingPlan, wish: ModelArgs) -> LLMConfig:
    from serve_apps.vllm_server import VllmServer  # brings vLLM's whole engine, which nobody else waits for

    return LLMConfig(
        model_loading_config={"model_id": plan.card.name, "model_source": source_of(plan.card)},
        engine_kwargs=vllm_args.engine_kwargs(plan),
        server_cls=VllmServer,
        # Ray checks engine_kwargs against vLLM's own arguments; here it lets the plan pass.
        experimental_configs={"plan": plan},
        deployment_config=deployment_options(plan, wish) | {"logging_config": LOGGING_CONFIG},
        **vllm_args.placement(plan),
    )
