"""What `/state` and `/ready` say of the models. Asking wakes none of them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse

from serve_apps.facts import ModelFacts
from serve_apps.states import ModelState, model_states

MAX_AGE_S = 1.0
"""How old an answer of the controller may be: many pages and probes ask at once, and it has other work."""
READINESS = {
    "running": "ready",
    "starting": "starting",
    "waiting": "starting",
    "asleep": "at zero, wakes on request",
    "failed": "failed",
}
READY_PHASES = ("running", "asleep")


class Status:
    """The state of the models behind `handles`, by model name."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], facts: Mapping[str, ModelFacts]) -> None:
        self._handles = handles
        self._facts = facts
        self._lock = asyncio.Lock()
        self._states: list[ModelState] = []
        self._asked_s = float("-inf")

    async def state(self, may_know: Callable[[str], bool]) -> JSONResponse:
        """Answer `/state`: replicas of each model that the client may know of, and the cluster's GPUs."""
        states = [state for state in await self._model_states() if may_know(state.model)]
        return JSONResponse(state_body(states, await asyncio.to_thread(gpus)))

    async def ready(self) -> JSONResponse:
        """Answer `/ready`: 200 when each model answers or would wake, else 503."""
        return readiness(list(self._handles), await self._model_states())

    async def _model_states(self) -> list[ModelState]:
        async with self._lock:
            if time.monotonic() - self._asked_s > MAX_AGE_S:
                self._states = await model_states(self._handles, self._facts)
                self._asked_s = time.monotonic()
            return self._states


def readiness(models: Sequence[str], states: Sequence[ModelState]) -> JSONResponse:
    """Return the answer to a readiness probe for `models`; one that Serve does not know yet is starting.

    Everybody may ask, so it counts models and names none.
    """
    phases = {state.model: state.phase for state in states}
    words = Counter(READINESS[phases.get(model, "starting")] for model in models)
    is_ready = all(phases.get(model) in READY_PHASES for model in models)
    body = {"status": "ready" if is_ready else "not ready", "num_models": dict(words)}
    return JSONResponse(body, status_code=200 if is_ready else 503)


def state_body(states: Sequence[ModelState], gpus_in_use: dict[str, float]) -> dict[str, Any]:
    """Return the body of `/state`. Which nodes there are is the operator's to know, not each client's."""
    models = [
        {
            "model": state.model,
            "phase": state.phase,
            "num_running": state.num_running,
            "num_starting": state.num_starting,
            "num_stopping": state.num_stopping,
            "target_num_replicas": state.target_num_replicas,
            "min_replicas": state.min_replicas,
            "max_replicas": state.max_replicas,
            "num_gpus": state.num_gpus,
            "accelerator_type": state.accelerator_type,
        }
        for state in states
    ]
    return {"models": models, "gpus": gpus_in_use}


def gpus() -> dict[str, float]:
    """Return how many GPUs the cluster has, and how many of them are reserved."""
    total = float(ray.cluster_resources().get("GPU", 0))
    return {"total": total, "used": total - float(ray.available_resources().get("GPU", 0))}
