"""The HTTP surface: Ray Serve LLM's OpenAI ingress, with local adapters and OpenAI's own error shape."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from ray.llm._internal.serve.core.configs.openai_api_models import TokenizeChatRequest
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import HTMLResponse, JSONResponse, Response

from cluster.registry import Registry
from serve_apps import responses
from serve_apps.admission import Admission, not_allowed
from serve_apps.call import Call, call_of
from serve_apps.facts import ModelFacts
from serve_apps.gate import admission_of
from serve_apps.meter import Meter
from serve_apps.playground import playground
from serve_apps.refusals import Refusal
from serve_apps.request_bodies import ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, whole_messages
from serve_apps.status import Status
from serve_apps.versions import Versions
from serve_apps.waking import PatientHandle

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
ENDPOINTS = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions", responses=STREAMED),
    "chat": lambda app: app.post("/v1/chat/completions", responses=STREAMED),
    "embeddings": lambda app: app.post("/v1/embeddings"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
    "health": lambda app: app.get("/health"),
    "ready": lambda app: app.get("/ready"),
    "state": lambda app: app.get("/state"),
    "page": lambda app: app.get("/", include_in_schema=False),
}
"""Routes by method; Ray's own map holds endpoints that the transformers engine does not have."""


class Ingress(OpenAiIngress):  # type: ignore[misc] # the constructor and routing are Ray's
    """Answers for all models of the application."""

    def __init__(self, llm_deployments: dict[str, Any], facts: dict[str, ModelFacts]) -> None:
        super().__init__(llm_deployments, {name: {"max_model_len": f.max_model_len} for name, f in facts.items()})
        self._facts = facts
        self._versions = Versions(facts)
        self._status = Status(self._default_serve_handles, facts)

    async def health(self) -> dict[str, str]:
        """Say that the application answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Say whether every model answers or would wake for a request: 200, else 503."""
        return await self._status.ready()

    async def state(self, request: Request) -> JSONResponse:
        """Say how many replicas each model has and which share of the GPUs is in use."""
        return await self._status.state(admission_of(call_of(request)).may_know)

    async def page(self) -> HTMLResponse:
        """Return the playground."""
        return playground()

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        response: Response = await super().chat(whole_messages(body), request)
        return response

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Go on with one or more texts, whole or as a stream of server-sent events."""
        response: Response = await super().completions(body, request)
        return response

    async def embeddings(self, body: EmbeddingBody, request: Request) -> Response:
        """Embed texts: the mean of the last hidden states over each text's tokens, not scaled to length 1."""
        response: Response = await super().embeddings(body, request)
        return response

    async def tokenize(self, body: TokenizeBody, request: Request) -> Response:
        """Count the tokens of a prompt, or of a conversation as the model would read it."""
        if isinstance(body, TokenizeChatRequest):
            body = whole_messages(body)
        response: Response = await super().tokenize(body, request)
        return response

    async def models(self, request: Request) -> JSONResponse:
        """List the base models and every adapter of theirs, as `model:adapter`, as far as the key may use them."""
        data = await asyncio.to_thread(self._list_models, admission_of(call_of(request)))
        return JSONResponse({"object": "list", "data": data})

    async def model_data(self, model: str, request: Request) -> JSONResponse:
        """Describe one model or adapter."""
        call = call_of(request)
        await self._resolve(self._asked_for(model, call), call)
        return JSONResponse(self._describe(model))

    def _list_models(self, admission: Admission) -> list[dict[str, Any]]:
        registry = Registry.default()
        found = []
        for base in self._model_cards:
            found += [base] if admission.may_use(base) else []
            found += [f"{base}:{name}" for name in registry.names(base) if admission.may_know(base, name)]
        return [self._describe(name) for name in found]

    def _describe(self, model: str) -> dict[str, Any]:
        base = model.partition(":")[0]
        about: dict[str, Any] = {"id": model, "object": "model", "created": _STARTED, "owned_by": "kajiya"}
        about.update(self._model_cards[base])
        return about | ({"parent": base} if model != base else {})

    def _asked_for(self, model: str | None, call: Call) -> str:
        """Return the name that is meant; what the key may not use is refused the same whether it is there or not."""
        admission = admission_of(call)
        known = ", ".join(sorted(filter(admission.may_know, self._model_cards))) or "none"
        if model is None and len(self._model_cards) > 1:
            raise Refusal(f"model is missing; served here: {known}.", param="model")
        name: str = model if model is not None else next(iter(self._model_cards))
        base, _, ref = name.partition(":")
        if not admission.may_know(base, ref.partition("@")[0]):
            raise not_allowed(name)
        if base not in self._model_cards:
            message = f"The model {name!r} is not served here; served: {known}."
            raise Refusal(message, param="model", code="model_not_found", status=404)
        return name

    async def _resolve(self, name: str, call: Call) -> str:
        admission = admission_of(call)
        try:
            resolved = await self._versions.resolve(name, call)
        except Refusal as refusal:
            raise admission.without_names(refusal, name) from None
        base, _, ref = resolved.partition(":")
        adapter, _, version = ref.partition("@")
        admission.check(base, adapter, int(version or 0))
        return resolved

    async def _get_model_id(self, model: str) -> str:
        return model  # resolved already, before Ray's code asks

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        # Ray's version makes a handle per adapter and waits up to a second for a replica that has it loaded. Every
        # replica of ours loads any adapter in a moment, so a request goes where there is room.
        base = model_id.partition(":")[0]
        # By value: each piece of an answer would otherwise be an object of Ray's, which costs a first token 2 ms.
        handle = super()._get_configured_serve_handle(base).options(_by_reference=False)
        return PatientHandle(handle=handle, facts=self._facts[base])

    async def _get_response(self, *, body: BaseModel, call_method: str, raw_request: Request) -> AsyncIterator[Any]:
        call = call_of(raw_request)
        call.user = getattr(body, "user", None)
        name = self._asked_for(getattr(body, "model", None), call)
        # From here on the name is exact, so that an answer comes from one version whatever is promoted meanwhile.
        vars(body)["model"] = await self._resolve(name, call)
        admission_of(call).reserve(vars(body), call_method, self._facts[name.partition(":")[0]].max_model_len)
        call.response_headers |= admission_of(call).quota.headers()
        meter = Meter(call, body)
        try:
            async for item in super()._get_response(body=body, call_method=call_method, raw_request=raw_request):
                _raise_refused(item)
                yield meter.read(item)
        except Refusal as refusal:
            if call.first_token_s is None:
                raise
            # The status is sent already, so the stream says it.
            call.error_code = refusal.code
            yield responses.event(
                responses.error_body(refusal.message, kind="server_error", param=refusal.param, code=refusal.code)
            )


def _raise_refused(item: Any) -> None:
    first = item[0] if isinstance(item, list) else item
    error = getattr(first, "error", None)
    if error is not None:
        raise Refusal(
            error.message,
            param=error.param,
            code=getattr(error, "kind", None),
            status=error.code,
            retry_after_s=getattr(error, "retry_after_s", None),
        )


_STARTED = int(time.time())
