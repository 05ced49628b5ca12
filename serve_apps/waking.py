"""Requests that wait for a replica with room: how long, how many, and what they are told when it was in vain."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Self

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_apps.facts import ModelFacts
from serve_apps.refusals import Refusal
from serve_apps.scaling import RETRY_AFTER_S
from serve_apps.states import ModelState, model_states, why_not_running

FAILED_RETRY_AFTER_S = 60
"""When to ask again for a model whose replicas do not start: somebody has to put it right first."""
LOST_RETRY_AFTER_S = 1
"""Another replica may take the request at once."""
LOST = (RayActorError, AioRpcError)
"""What a call raises whose replica died; Serve translates only one of gRPC's codes."""
UNDER_WAY: ContextVar[list[Any]] = ContextVar("UNDER_WAY")
"""What replicas were asked for the HTTP request at hand; whoever answers HTTP cancels it when the client leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientHandle:
    """A handle to one model's deployment whose calls wait for a replica within a bound.

    Serve's own wait for ever. A call at zero replicas wakes the model: the waiting request is what the autoscaler
    sees. A wait that ends at the bound does not put it to sleep again: the replica goes on loading for those who
    come back.
    """

    handle: DeploymentHandle
    facts: ModelFacts

    def options(self, **options: Any) -> Self:
        """Return this handle with other options of Serve's."""
        return replace(self, handle=self.handle.options(**options))

    def __getattr__(self, method_name: str) -> Self:
        """Return the handle to a method of the deployment, as Serve's handles do."""
        return replace(self, handle=getattr(self.handle, method_name))

    async def remote(self, *args: Any) -> AsyncIterator[Any]:
        """Call the method and yield what it yields.

        Raises:
            Refusal: 429 when too many wait already; 503 when no replica had room in time, or the model cannot start.
        """
        response = await self._ask(*args)
        try:
            async for item in response:
                yield item
        except LOST:
            raise replica_lost() from None

    async def _ask(self, *args: Any) -> Any:
        """Return the response once a replica has the request."""
        try:
            response = self.handle.remote(*args)
            UNDER_WAY.get([]).append(response)
            async with asyncio.timeout(self.facts.wake_timeout_s):
                # The wait alone, without the first token: an answer that takes long to begin is not cut off.
                await response._fetch_future_result_async()
        except TimeoutError:
            model = self.facts.name
            states = await model_states({model: self.handle}, {model: self.facts})
            raise no_room(self.facts.wake_timeout_s, states) from None
        except BackPressureError as error:
            raise too_many(self.facts.name, error) from None
        except DeploymentUnavailableError:
            raise _failed(self.facts.name) from None
        except LOST:
            raise replica_lost() from None
        return response


def replica_lost() -> Refusal:
    """Return what a client is told whose replica died."""
    message = "The replica that ran this request was lost. Try again."
    return Refusal(message, code="replica_lost", status=503, retry_after_s=LOST_RETRY_AFTER_S)


def too_many(model: str, error: BackPressureError) -> Refusal:
    """Return what a client is told when as many requests as may wait do so already."""
    num_queued_requests = error.args[0]
    return Refusal(
        f"{num_queued_requests} requests wait for {model} already, as many as may; try again in {RETRY_AFTER_S} s.",
        code="rate_limit_exceeded",
        status=error.status_code,
        retry_after_s=RETRY_AFTER_S,
    )


def no_room(timeout_s: float, states: list[ModelState]) -> Refusal:
    """Return what a client is told when no replica of the one model in `states` had room within `timeout_s`."""
    why = "its application is being deployed"
    for state in states:
        if state.phase == "failed":
            return _failed(state.model)
        why = why_not_running(state)
    message = f"No replica had room within {timeout_s:g} s: {why}. Try again in {RETRY_AFTER_S} s."
    return Refusal(message, code="model_not_ready", status=503, retry_after_s=RETRY_AFTER_S)


def _failed(model: str) -> Refusal:
    message = f"{model} does not start; the server's log says why."
    return Refusal(message, code="model_unavailable", status=503, retry_after_s=FAILED_RETRY_AFTER_S)
