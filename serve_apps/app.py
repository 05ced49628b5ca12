"""The Serve application: catalog -> plan -> deployments -> ingress. Import path: `serve_apps.app:build`."""

from typing import Any

from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve import Application

from cluster.catalog import find
from cluster.errors import UserError
from cluster.hardware import Hardware, declared, detect
from cluster.hub import ensure_available
from cluster.plan import ServingPlan, plan_serving
from serve_apps.args import ModelArgs, ServeArgs
from serve_apps.door import Address
from serve_apps.facts import ModelFacts, facts_of
from serve_apps.log import LOGGING_CONFIG
from serve_apps.replicas import IngressReplica, model_deployment
from serve_apps.scaling import CHECK_PERIOD_S, DRAIN_TIMEOUT_S, RETRY_AFTER_S

MAX_CONNECTIONS = 1000
"""Requests that the ingress holds open at a time, streams included; as many again wait in the proxy."""


class DuplicateModels(UserError, ValueError):
    """A model is asked for twice in one application."""


def build(args: ServeArgs) -> Application:
    """Return the application that serves `args.models` behind one OpenAI endpoint.

    Raises:
        UnknownModel, ModelUnavailable, DoesNotFit, DuplicateModels: before anything is started or downloaded.
    """
    wishes = [ModelArgs(model=model) if isinstance(model, str) else model for model in args.models]
    plans = [(plan_of(wish, hardware_of(wish, args)), wish) for wish in wishes]
    names = [plan.card.name for plan, _ in plans]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DuplicateModels(f"Asked for twice: {', '.join(twice)}.")
    deployments = {plan.card.name: model_deployment(plan, wish) for plan, wish in plans}
    facts = {plan.card.name: facts_of(plan, wish) for plan, wish in plans}
    return application(deployments, facts, Address(host=args.host, port=args.port) if args.port else None)


def hardware_of(wish: ModelArgs, args: ServeArgs) -> Hardware:
    """Return the node that a replica is planned for: the model's, else the application's, else this machine."""
    if wish.gpu:
        return declared(gpu=wish.gpu, num_gpus=wish.num_gpus or 1)
    return declared(gpu=args.gpu, num_gpus=args.num_gpus) if args.gpu else detect()


def plan_of(wish: ModelArgs, hardware: Hardware) -> ServingPlan:
    """Return the plan for one model, whose files are known to be within reach."""
    card = find(wish.model)
    plan = plan_serving(card, hardware, **wish.planned())
    ensure_available(card)
    return plan


def application(
    deployments: dict[str, Application], facts: dict[str, ModelFacts], address: Address | None = None
) -> Application:
    """Return the ingress over `deployments`; both by model name, `address` where it listens itself."""
    return serve.deployment(IngressReplica, name="Ingress", **_options()).bind(
        llm_deployments=deployments, facts=facts, address=address
    )


def _options() -> dict[str, Any]:
    # One process, since it only passes on what the engines say in few and large pieces, and since a key's limits are
    # counted in it. It never scales to zero itself, or nobody would be there to wake a model. Ray's own are two
    # replicas per model with a whole CPU each, which do not fit on a small machine. On the head, where proxy and
    # registry are: elsewhere it would keep a node with a GPU from going when its models do.
    return {
        "num_replicas": 1,
        "max_ongoing_requests": MAX_CONNECTIONS,
        "max_queued_requests": MAX_CONNECTIONS,
        "backpressure_config": {"retry_after_s": RETRY_AFTER_S},
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S,
        "health_check_period_s": CHECK_PERIOD_S,
        "ray_actor_options": {"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}},
        "logging_config": LOGGING_CONFIG,
    }
