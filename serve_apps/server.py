"""The deployment of one model on the transformers engine, behind Ray Serve LLM's ingress."""

import asyncio
import copy
import itertools
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel
from ray.llm._internal.serve.core.configs.openai_api_models import DetokenizeResponse, TokenizeResponse
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import (
    ChatCompletionResponse,
    CompletionResponse,
    EmbeddingResponse,
    ErrorResponse,
)

from cluster.plan import ServingPlan
from serve_apps import embeddings, responses, short_thread
from serve_apps.answers import Answering
from serve_apps.embeddings import read_embeddings
from serve_apps.engine import EngineStopped
from serve_apps.leaving import end_with_engine
from serve_apps.message_stream import MessageStreams
from serve_apps.refusals import Refusal
from serve_apps.requests import Job, read_chat, read_completion
from serve_apps.responses import Endpoint, Head
from serve_apps.runtime import Runtime, start_runtime
from serve_apps.tokenizing import detokenize, tokenize
from serve_apps.waking import LOST_RETRY_AFTER_S

MAX_EVENTS_PER_S = 16 * (os.cpu_count() or 1)
"""Server-sent events of all streams of this replica together. Each costs the processes that it crosses a millisecond or
two, and on a CPU they compete with the model for cores."""
MAX_EVENT_INTERVAL_S = 0.5


class TransformersServer:
    """Answers requests for one model; the methods are those that Ray's ingress and Serve call (`LLMServerProtocol`)."""

    def __init__(self, llm_config: LLMConfig, runtime: Runtime | None = None) -> None:
        self._llm_config = llm_config
        self._runtime = runtime or _start_for_life(llm_config.engine_kwargs["plan"])
        self._ids = itertools.count()
        self._num_streams = 0

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        """Return Serve's options; Ray's own version would ask vLLM for them."""
        return copy.deepcopy(llm_config.deployment_config)

    async def llm_config(self) -> LLMConfig:
        """Return what this replica was made from."""
        return self._llm_config

    async def check_health(self) -> None:
        """Raise when the engine is dead, so that Serve replaces the replica."""
        self._runtime.engine.check_health()

    async def num_active_requests(self) -> int:
        """Return the answers in the batch or waiting for it."""
        return self._runtime.engine.num_active_requests()

    async def chat(self, request: BaseModel, raw_request_info: object = None) -> AsyncIterator[Any]:  # noqa: ARG002
        """Answer `/v1/chat/completions`."""
        async for item in _refusable(self._generate(request, "chat")):
            yield item

    async def completions(self, request: BaseModel, raw_request_info: object = None) -> AsyncIterator[Any]:  # noqa: ARG002
        """Answer `/v1/completions`."""
        async for item in _refusable(self._generate(request, "completions")):
            yield item

    async def embeddings(self, request: BaseModel, raw_request_info: object = None) -> AsyncIterator[Any]:  # noqa: ARG002
        """Answer `/v1/embeddings`."""
        async for item in _refusable(self._embed(request)):
            yield item

    async def tokenize(self, request: BaseModel, raw_request_info: object = None) -> AsyncIterator[Any]:  # noqa: ARG002
        """Answer `/tokenize`."""
        async for item in _refusable(self._tokenize(request)):
            yield item

    async def detokenize(self, request: BaseModel, raw_request_info: object = None) -> AsyncIterator[Any]:  # noqa: ARG002
        """Answer `/detokenize`."""
        async for item in _refusable(self._detokenize(request)):
            yield item

    async def _generate(self, request: BaseModel, endpoint: Endpoint) -> AsyncIterator[Any]:
        runtime = self._runtime
        read = read_chat if endpoint == "chat" else read_completion
        # In a thread: a long prompt takes milliseconds to tokenize, and streams go on meanwhile.
        job = await asyncio.to_thread(read, request, runtime.tokenizer, runtime.limits)
        async with AsyncExitStack() as stack:
            model, slot = await stack.enter_async_context(self._lease(request))
            head = Head(
                endpoint=endpoint,
                response_id=f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
                created=int(time.time()),
                model=model,
            )
            answering = stack.enter_context(Answering(runtime, job, slot, request_id=str(next(self._ids))))
            if job.is_stream:
                async for text in self._stream(answering, job, head):
                    yield text
            else:
                yield await _whole(answering, job, head)

    @asynccontextmanager
    async def _lease(self, request: BaseModel) -> AsyncIterator[tuple[str, int]]:
        """Hold the adapter that `request` names, if any; yield the served name and the adapter's slot."""
        model, _, ref = (vars(request)["model"] or self._llm_config.model_id).partition(":")
        if not ref:
            yield model, -1
            return
        async with self._runtime.adapters.lease(ref) as lease:
            yield lease.version.served_name, lease.slot

    async def _embed(self, request: BaseModel) -> AsyncIterator[EmbeddingResponse]:
        runtime = self._runtime
        embedder = runtime.embedder
        if embedder is None:
            name = self._llm_config.model_id
            message = f"{name} is served by an engine without embeddings; serve it with engine: transformers."
            raise Refusal(message, param="model", code="unsupported_endpoint")
        runtime.engine.check_health()
        job = await asyncio.to_thread(read_embeddings, request, runtime.tokenizer, runtime.limits)
        async with self._lease(request) as (model, slot):
            passes = embedder.passes(job.inputs)
            rows = torch.cat([await short_thread.run_async(partial(embedder.embed, group, slot)) for group in passes])
        body = await asyncio.to_thread(embeddings.body, job, rows, model)
        yield EmbeddingResponse.model_validate(body)

    async def _tokenize(self, request: BaseModel) -> AsyncIterator[TokenizeResponse]:
        runtime = self._runtime
        limit = runtime.limits.max_model_len
        yield TokenizeResponse.model_validate(await asyncio.to_thread(tokenize, request, runtime.tokenizer, limit))

    async def _detokenize(self, request: BaseModel) -> AsyncIterator[DetokenizeResponse]:
        runtime = self._runtime
        size = runtime.limits.vocab_size
        yield DetokenizeResponse.model_validate(await asyncio.to_thread(detokenize, request, runtime.tokenizer, size))

    async def _stream(self, answering: Answering, job: Job, head: Head) -> AsyncIterator[str]:
        opening = responses.role_events(head, len(job.answers))
        messages = MessageStreams(job.reading, len(job.answers))
        self._num_streams += 1
        try:
            async for pieces in answering.pieces(self._event_interval_s):
                events = opening + "".join(responses.piece_event(head, piece) for piece in messages.read(pieces))
                if events:
                    yield events
                opening = ""
        except RuntimeError as error:  # the engine died: the status is sent already, so the stream says it
            yield responses.event(responses.error_body(str(error), kind="server_error", param=None, code=None))
            return
        finally:
            self._num_streams -= 1
        counts = responses.usage(job.num_prompt_tokens, answering.num_tokens)
        yield (responses.usage_event(head, counts) if job.is_usage_streamed else "") + responses.DONE

    def _event_interval_s(self) -> float:
        return min(self._num_streams / MAX_EVENTS_PER_S, MAX_EVENT_INTERVAL_S)


def _start_for_life(plan: ServingPlan) -> Runtime:
    """Return the runtime with whose engine this process, a replica's, lives and ends."""
    runtime = start_runtime(plan)
    end_with_engine(runtime.engine)
    return runtime


async def _refusable(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    try:
        async for item in items:
            yield item
    except Refusal as refusal:
        yield refusal_response(refusal)
    except EngineStopped as error:  # this replica ends; another may take the request at once
        yield refusal_response(Refusal(str(error), code="engine_failed", status=503, retry_after_s=LOST_RETRY_AFTER_S))


async def _whole(answering: Answering, job: Job, head: Head) -> ChatCompletionResponse | CompletionResponse:
    pieces = MessageStreams(job.reading, len(job.answers)).read(await answering.whole())
    body = responses.whole(head, pieces, responses.usage(job.num_prompt_tokens, answering.num_tokens))
    kind = ChatCompletionResponse if head.endpoint == "chat" else CompletionResponse
    response: ChatCompletionResponse | CompletionResponse = kind.model_validate(body)
    return response


def refusal_response(refusal: Refusal) -> ErrorResponse:
    """Return the refusal as the object that Ray's ingress expects; the extras are for ours to read."""
    kind = "not_found_error" if refusal.status == 404 else "invalid_request_error"
    fields = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.status}
    extra = {"kind": refusal.code, "retry_after_s": refusal.retry_after_s}
    return ErrorResponse.model_validate({"error": fields | extra})
