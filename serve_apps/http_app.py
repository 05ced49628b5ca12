"""The FastAPI application under the ingress: middlewares, and every error in OpenAI's shape."""

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from ray.exceptions import RayActorError, TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from vllm.exceptions import VLLMClientError

from serve_apps import adapter_routes
from serve_apps.audit import audit
from serve_apps.call import CLIENT_LEFT, CallMiddleware, call_of
from serve_apps.door import Address
from serve_apps.facts import ModelFacts
from serve_apps.gate import Gate
from serve_apps.ingress import ENDPOINTS, Ingress
from serve_apps.listener import listening
from serve_apps.metrics import count
from serve_apps.refusals import Refusal
from serve_apps.responses import error_body
from serve_apps.version_counts import VersionCounts
from serve_apps.waking import replica_lost

MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200


class ErrorObject(BaseModel):
    """OpenAI's description of what went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is at fault."""
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused; it never reached the model."},
    "5XX": {"model": ErrorBody, "description": "The request failed. After a 503, ask again in Retry-After seconds."},
}
"""In the OpenAPI document, in place of FastAPI's own shape."""
KEY = HTTPBearer(auto_error=False, description="An API key. The gate asks for it; this only documents it.")


def serving_app(ingress: Ingress, facts: dict[str, ModelFacts], address: Address | None) -> FastAPI:
    """Return the application whose routes are the methods of `ingress`; at `address` it listens itself."""
    app = make_app()
    app.state.facts = facts
    app.state.address = address
    for method, route in ENDPOINTS.items():
        route(app)(getattr(ingress, method))  # type: ignore[no-untyped-call]
    return app


def make_app() -> FastAPI:
    """Return the FastAPI application that the ingress's routes are put on.

    Ray's own adds a middleware that copies every chunk of a stream through a queue, CORS for all origins, and errors
    in another shape than OpenAI's.
    """
    app = FastAPI(
        title="Kajiya",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        dependencies=[Depends(KEY)],
        lifespan=listening,
    )
    app.state.address = None
    app.state.version_counts = VersionCounts()
    app.add_middleware(Gate, refuse=refusal_response)
    # The last that is added is the first that is passed.
    app.add_middleware(CallMiddleware, observers=(audit, count, app.state.version_counts.observe))
    app.include_router(adapter_routes.router)
    app.add_exception_handler(Refusal, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(VLLMClientError, _invalid_for_vllm)
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RayActorError, _replica_lost)
    app.add_exception_handler(TaskCancelledError, _client_left)
    app.add_exception_handler(Exception, _failed)
    return app


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kinds = {404: "not_found_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    # Names of fields and models are the client's, and may be as long as a body.
    message, param = message[:MAX_MESSAGE_CHARS], param and param[:MAX_PARAM_CHARS]
    return JSONResponse(error_body(message, kind=kind, param=param, code=code), status_code=status)


def refusal_response(refusal: Refusal) -> JSONResponse:
    """Return the answer to a refused request."""
    response = _error(refusal.status, refusal.message, refusal.param, refusal.code)
    if refusal.retry_after_s is not None:
        response.headers["retry-after"] = str(refusal.retry_after_s)
    if refusal.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _refused(request: Request, error: Refusal) -> JSONResponse:
    call_of(request).error_code = error.code
    return refusal_response(error)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    if "json" not in request.headers.get("content-type", ""):  # what curl sends without -H
        return _error(400, "The body is not JSON; send it with the header Content-Type: application/json.")
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
    return refusal_response(replica_lost())


async def _client_left(_: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=CLIENT_LEFT)  # nobody reads it: it is for those who count


async def _failed(_: Request, error: Exception) -> JSONResponse:  # noqa: ARG001 (Starlette logs it after this)
    return _error(500, "Internal error; the server's log has it.")
