"""What Serve starts on the nodes: classes that import their work where it is done.

Ray Serve LLM and what it stands on take a process six seconds to import. Whoever builds the application needs none of
it, and the replicas import it at the same time, each on a core of its own.
"""

import gc
import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster.plan import ServingPlan
from serve_apps.args import ModelArgs
from serve_apps.door import Address
from serve_apps.facts import ModelFacts
from serve_apps.log import LOGGING_CONFIG
from serve_apps.scaling import deployment_options

HEALTH_CHECK_TIMEOUT_S = 10.0
"""Ray Serve LLM's own; Serve's is three times as long."""
GC_THRESHOLD = 50_000
"""New objects before Python looks for garbage. Ray Serve LLM imports half a million that stay; to look through them
after every 700, as Python does, is a seventh of the import."""


@serve.ingress()
class IngressReplica:
    """The HTTP surface before `llm_deployments`; `facts` by model name, `address` where it listens itself."""

    def __init__(
        self, llm_deployments: dict[str, Any], facts: dict[str, ModelFacts], address: Address | None = None
    ) -> None:
        _prepare_imports()
        from serve_apps.http_app import serving_app
        from serve_apps.ingress import Ingress

        self._app = serving_app(Ingress(llm_deployments, facts), facts, address)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return what answers; Serve asks for it after the constructor."""
        return self._app


class ModelReplica:
    """A `TransformersServer` for `plan`, with its methods."""

    def __init__(self, plan: ServingPlan, wish: ModelArgs) -> None:
        _prepare_imports()
        from serve_apps.llm_configs import llm_config_of
        from serve_apps.server import TransformersServer

        self._server = TransformersServer(llm_config_of(plan, wish))

    def __getattr__(self, name: str) -> Any:
        """Return what the server has under `name`."""
        if name == "_server":  # it is not made yet
            raise AttributeError(name)
        return getattr(self._server, name)


def _prepare_imports() -> None:
    gc.set_threshold(GC_THRESHOLD)
    # vLLM would set up logging when it is imported, for which Python closes the handlers that Serve has made.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")


def model_deployment(plan: ServingPlan, wish: ModelArgs) -> serve.Application:
    """Return the deployment of one model, on the engine of its plan."""
    if plan.engine == "vllm":  # Ray derives its placement from vLLM's own arguments
        from ray.serve.llm import build_llm_deployment

        from serve_apps.llm_configs import llm_config_of

        application: serve.Application = build_llm_deployment(llm_config_of(plan, wish))
        return application
    name = plan.card.name.replace("/", "--").replace(".", "_")  # as Ray names the deployment of a model
    options = transformers_options(plan, wish) | {"health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S}
    return serve.deployment(ModelReplica, name=f"TransformersServer:{name}", **options).bind(plan, wish)


def transformers_options(plan: ServingPlan, wish: ModelArgs) -> dict[str, Any]:
    """Return Serve's options of a model on the transformers engine."""
    gpu = plan.hardware.gpu
    placement = {"accelerator_type": gpu.name} if gpu and plan.num_gpus else {}
    actor = {"num_cpus": 1, "num_gpus": plan.num_gpus} | placement
    return deployment_options(plan, wish) | {"logging_config": LOGGING_CONFIG, "ray_actor_options": actor}
