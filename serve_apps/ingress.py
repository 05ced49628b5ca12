"""The HTTP surface: Ray Serve LLM's OpenAI ingress, with local adapters and OpenAI's own error shape."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayActorError
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMClientError

from cluster.errors import UserError
from cluster.registry import Registry
from serve_apps.refusals import Refusal
from serve_apps.responses import error_body

ENDPOINTS = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "health": lambda app: app.get("/health"),
}
"""Routes by method; Ray's own map holds endpoints that the transformers engine does not have."""


class Ingress(OpenAiIngress):  # type: ignore[misc] # the constructor and routing are Ray's
    """Answers for all models of the application."""

    async def health(self) -> dict[str, str]:
        """Say that the application answers."""
        return {"status": "ok"}

    async def models(self) -> JSONResponse:
        """List the base models and every adapter of theirs, as `model:adapter`."""
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(self._list_models)})

    async def model_data(self, model: str) -> JSONResponse:
        """Describe one model or adapter."""
        name, _, ref = model.partition(":")
        await self._get_model_id(model)
        if ref:
            try:
                await asyncio.to_thread(Registry.default().resolve, name, ref)
            except UserError as error:
                raise Refusal(str(error), param="model", code="model_not_found", status=404) from error
        return JSONResponse(self._describe(model))

    def _list_models(self) -> list[dict[str, Any]]:
        registry = Registry.default()
        names = ((base, (f"{base}:{adapter}" for adapter in registry.names(base))) for base in self._model_cards)
        return [self._describe(name) for base, adapters in names for name in (base, *adapters)]

    def _describe(self, model: str) -> dict[str, Any]:
        base = model.partition(":")[0]
        about: dict[str, Any] = {"id": model, "object": "model", "created": _STARTED, "owned_by": "kajiya"}
        about.update(self._model_cards[base])
        return about | ({"parent": base} if model != base else {})

    async def _get_model_id(self, model: str | None) -> str:
        known = ", ".join(sorted(self._model_cards))
        if model is None and len(self._model_cards) > 1:
            raise Refusal(f"model is missing; served here: {known}.", param="model")
        name: str = model if model is not None else next(iter(self._model_cards))
        if name.partition(":")[0] not in self._model_cards:
            raise Refusal(
                f"The model {name!r} is not served here; served: {known}.",
                param="model",
                code="model_not_found",
                status=404,
            )
        return name

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        # Ray's version makes a handle per adapter and waits up to a second for a replica that has it loaded. Every
        # replica of ours loads any adapter in a moment, so a request goes where there is room.
        return super()._get_configured_serve_handle(model_id.partition(":")[0])

    async def _get_response(self, **kwargs: Any) -> AsyncIterator[Any]:
        async for item in super()._get_response(**kwargs):
            first = item[0] if isinstance(item, list) else item
            error = getattr(first, "error", None)
            if error is not None:
                raise Refusal(error.message, param=error.param, code=getattr(error, "kind", None), status=error.code)
            yield item


_STARTED = int(time.time())


def make_app() -> FastAPI:
    """Return the FastAPI application that the ingress's routes are put on.

    Ray's own adds a middleware that copies every chunk of a stream through a queue, CORS for all origins, and errors
    in another shape than OpenAI's.
    """
    app = FastAPI(title="Kajiya", docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(VLLMClientError, _invalid_for_vllm)
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RayActorError, _replica_lost)
    app.add_exception_handler(Exception, _failed)
    return app


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kinds = {404: "not_found_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(error_body(message, kind=kind, param=param, code=code), status_code=status)


async def _refused(_: Request, error: Refusal) -> JSONResponse:
    return _error(error.status, error.message, error.param, error.code)


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    # pydantic names the branches of a union after the field; the field is what the client knows.
    path = [part for part in first["loc"] if part != "body"]
    field = ".".join(map(str, path[:1])) or None
    return _error(400, f"{field or 'The body'} is not valid: {first['msg']}.", field)


async def _invalid_for_vllm(_: Request, error: VLLMClientError) -> JSONResponse:
    # The request classes are vLLM's. Their own checks raise this, which pydantic does not take for a validation error.
    message = str(error.args[0]) if error.args else type(error).__name__
    return _error(400, message, getattr(error, "parameter", None))


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


async def _replica_lost(_: Request, error: RayActorError) -> JSONResponse:  # noqa: ARG001
    return _error(503, "The replica that ran this request was lost. Try again.")


async def _failed(_: Request, error: Exception) -> JSONResponse:  # noqa: ARG001 (Starlette logs it after this)
    return _error(500, "Internal error; the server's log has it.")
