"""`/v1/adapters`: read by every key, changed by admin keys. What a change does is the registry's business."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cluster.alias import Canary
from cluster.canary import start_canary
from cluster.pins import pin, unpin
from cluster.registry import Registry
from serve_apps.adapter_refusals import adapter_errors
from serve_apps.admission import not_allowed
from serve_apps.call import call_of
from serve_apps.facts import ModelFacts
from serve_apps.gate import admission_of, require_admin
from serve_apps.refusals import Refusal
from serve_apps.version_counts import VersionCounts

router = APIRouter(prefix="/v1/adapters")
# The handlers are not async: FastAPI runs them in threads, where they may wait for the registry's store.


class CanaryBody(BaseModel):
    """The body of a canary request."""

    model_config = ConfigDict(extra="forbid")

    percent: float = Field(gt=0, le=100)
    """Share of the users that get the candidate."""


class PromoteBody(BaseModel):
    """The body of a promotion, in which nothing may be said: a condition would have to be kept."""

    model_config = ConfigDict(extra="forbid")


@router.get("")
def list_adapters(request: Request) -> dict[str, Any]:
    """List the adapters of all models served here, as far as the key may use them; reads no manifest."""
    registry, may_know = Registry.default(), admission_of(call_of(request)).may_know
    known = [(model, name) for model in _facts(request) for name in registry.names(model) if may_know(model, name)]
    with adapter_errors():
        return {"object": "list", "data": [_about(registry, model, name) for model, name in known]}


@router.get("/{adapter:path}")
def show_adapter(adapter: str, request: Request) -> dict[str, Any]:
    """Return an adapter, the manifest of its current or the named version, and what each version answered so far."""
    model, ref = _place(request, adapter)
    counts: VersionCounts = request.app.state.version_counts
    registry = Registry.default()
    try:
        with adapter_errors():
            version = registry.resolve(model, ref)
    except Refusal as refusal:
        raise admission_of(call_of(request)).without_names(refusal, adapter) from refusal
    with adapter_errors():
        return _about(registry, model, version.name) | {
            "max_loras": _facts(request)[model].max_loras,
            "counts": counts.of(model, version.name),
            "manifest": version.manifest.model_dump(mode="json"),
        }


@router.post("/{adapter:path}/promote")
def promote_adapter(adapter: str, request: Request, body: PromoteBody | None = None) -> dict[str, Any]:  # noqa: ARG001
    """Let the name mean this version, from the next request on; an evaluation is the command line's."""
    model, name, version = _version(request, adapter)
    with adapter_errors():
        Registry.default().promote(model, name, version)
        return _about(Registry.default(), model, name)


@router.post("/{adapter:path}/canary")
def start_adapter_canary(adapter: str, body: CanaryBody, request: Request) -> dict[str, Any]:
    """Let a part of the users get this version."""
    model, name, version = _version(request, adapter)
    with adapter_errors():
        start_canary(Registry.default(), model, name, Canary(version=version, percent=body.percent))
        return _about(Registry.default(), model, name)


@router.post("/{adapter:path}/rollback")
def roll_adapter_back(adapter: str, request: Request) -> dict[str, Any]:
    """End the canary, or let the name mean what it meant before."""
    model, name = _name(request, adapter)
    with adapter_errors():
        Registry.default().rollback(model, name)
        return _about(Registry.default(), model, name)


@router.post("/{adapter:path}/pin")
def pin_adapter(adapter: str, request: Request) -> dict[str, Any]:
    """Keep the current version in the memory of the replicas."""
    model, name = _name(request, adapter)
    with adapter_errors():
        pin(Registry.default(), model, name, max_loras=_facts(request)[model].max_loras)
        return _about(Registry.default(), model, name)


@router.post("/{adapter:path}/unpin")
def unpin_adapter(adapter: str, request: Request) -> dict[str, Any]:
    """Let the adapter make room again."""
    model, name = _name(request, adapter)
    with adapter_errors():
        unpin(Registry.default(), model, name)
        return _about(Registry.default(), model, name)


@router.delete("/{adapter:path}")
def remove_adapter(adapter: str, request: Request) -> dict[str, Any]:
    """Delete a version, or an adapter with all its versions; requests that run through it end in peace."""
    require_admin(call_of(request))
    model, ref = _place(request, adapter)
    with adapter_errors():
        Registry.default().remove(model, ref)
    return {"id": adapter, "object": "adapter", "deleted": True}


def _about(registry: Registry, model: str, name: str) -> dict[str, Any]:
    alias = registry.alias(model, name)
    return {
        "id": f"{model}:{name}",
        "object": "adapter",
        "model": model,
        "version": alias.version,
        "previous": list(alias.previous),
        "canary": alias.canary.model_dump() if alias.canary else None,
        "pinned": alias.is_pinned,
        "versions": list(registry.versions(model, name)),
    }


def _place(request: Request, adapter: str) -> tuple[str, str]:
    """Return base model and reference; refuses what is not served here, or not known to the key."""
    model, _, ref = adapter.partition(":")
    if not admission_of(call_of(request)).may_know(model, ref.partition("@")[0]):
        raise not_allowed(adapter)
    if model not in _facts(request) or not ref:
        raise Refusal(
            f"{adapter!r} is no adapter of a model served here ({', '.join(_facts(request))}); write MODEL:ADAPTER.",
            param="model",
            code="model_not_found",
            status=404,
        )
    return model, ref


def _name(request: Request, adapter: str) -> tuple[str, str]:
    require_admin(call_of(request))
    model, ref = _place(request, adapter)
    if "@" in ref:
        raise Refusal(f"{adapter!r} is one version; this is done to the whole adapter, {adapter.partition('@')[0]!r}.")
    return model, ref


def _version(request: Request, adapter: str) -> tuple[str, str, int]:
    require_admin(call_of(request))
    model, ref = _place(request, adapter)
    if "@" not in ref:
        raise Refusal(f"{adapter!r} names no version; write MODEL:ADAPTER@VERSION.", param="model")
    with adapter_errors():
        found = Registry.default().resolve(model, ref)
    return model, found.name, found.version


def _facts(request: Request) -> dict[str, ModelFacts]:
    facts: dict[str, ModelFacts] = request.app.state.facts
    return facts
