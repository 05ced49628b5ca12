"""An engine without a model: it answers after as many seconds as it is told, and says which replica it is."""

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionRequest, ChatCompletionResponse


class FakeServer:
    """The methods that Ray's ingress and Serve call on a server of ours; `start_s` in the config delays its start."""

    def __init__(self, llm_config: LLMConfig) -> None:
        self._llm_config = llm_config
        time.sleep(llm_config.experimental_configs.get("start_s", 0))

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        return copy.deepcopy(llm_config.deployment_config)

    async def llm_config(self) -> LLMConfig:
        return self._llm_config

    async def check_health(self) -> None:
        return None

    async def chat(self, request: ChatCompletionRequest, raw_request_info: object = None) -> AsyncIterator[Any]:  # noqa: ARG002
        """Answer with replica and node; the message is the number of seconds that takes, in tenths when streamed."""
        seconds = float(str(vars(request)["messages"][0]["content"]))
        replica = serve.get_replica_context().replica_id.unique_id
        text = json.dumps({"replica": replica, "node": ray.get_runtime_context().get_node_id()})
        if request.stream:
            for _ in range(10):
                await asyncio.sleep(seconds / 10)
                yield f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': []})}\n\n"
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(seconds)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": self._llm_config.model_id}
        yield ChatCompletionResponse.model_validate(body | {"choices": choices, "usage": usage})
