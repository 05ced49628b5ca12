"""What the server makes of an engine's tokens; the engine says what the test puts into its mouth."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from tiny_models import CHATML, IM_END, byte_tokenizer

from serve_apps.adapters import AdapterSlots
from serve_apps.engine import Progress
from serve_apps.requests import ModelLimits
from serve_apps.runtime import Runtime
from serve_apps.sampling import Sampling
from serve_apps.server import TransformersServer

TEMPLATE = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{# <tool_call> </think> #}" + CHATML
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class ScriptedEngine:
    """Says one text, a token (a byte) at a time."""

    def __init__(self, text: str) -> None:
        self.token_ids = [*byte_tokenizer()(text).input_ids, IM_END]

    def submit(
        self,
        request_id: str,  # noqa: ARG002
        prompt_ids: list[int],  # noqa: ARG002
        *,
        max_tokens: int,
        stop_token_ids: list[int],  # noqa: ARG002
        sampling: Sampling,  # noqa: ARG002
        slot: int,  # noqa: ARG002
        on_progress: Callable[[Progress], None],
        is_streaming: bool = True,
    ) -> None:
        said = self.token_ids[:max_tokens]
        parts = [[token_id] for token_id in said] if is_streaming else [said]
        for i, part in enumerate(parts):
            on_progress(Progress(token_ids=part, is_finished=i == len(parts) - 1))

    def cancel(self, request_id: str) -> None: ...

    def check_health(self) -> None: ...

    def num_active_requests(self) -> int:
        return 0


def server_that_says(text: str) -> TransformersServer:
    limits = ModelLimits(
        max_model_len=2000, max_num_seqs=4, vocab_size=258, stop_token_ids=(IM_END,), defaults=Sampling(temperature=0)
    )
    runtime = Runtime(
        engine=ScriptedEngine(text),
        tokenizer=byte_tokenizer(TEMPLATE),
        adapters=cast("AdapterSlots", None),  # no request here names one
        limits=limits,
    )
    return TransformersServer(LLMConfig(model_loading_config={"model_id": "scripted"}), runtime)


def chat(text: str, **fields: Any) -> Any:
    """The choice of the one answer."""
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], **fields)

    async def run() -> Any:
        return [item async for item in server_that_says(text).chat(request)]

    (response,) = asyncio.run(run())
    return response.model_dump()["choices"][0]


def streamed(text: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all events."""
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], stream=True, **fields)

    async def run() -> str:
        return "".join([item async for item in server_that_says(text).chat(request)])

    events = [event.removeprefix("data: ") for event in asyncio.run(run()).split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event)["choices"][0] for event in events[:-2]]


def test_a_call_that_the_model_decides_on_is_no_content() -> None:
    choice = chat(f"Let me add.\n{CALL}", tools=TOOLS)
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Let me add."
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert call["id"].startswith("call_")
    assert choice["finish_reason"] == "tool_calls"


def test_a_streamed_call_has_its_id_and_name_once_and_its_arguments_in_pieces() -> None:
    choices = streamed(f"Let me add.\n{CALL}", tools=TOOLS)
    deltas = [choice["delta"] for choice in choices]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me add."
    assert [call["index"] for call in calls] == [0] * len(calls)
    assert [call["function"].get("name") for call in calls] == ["add"] + [None] * (len(calls) - 1)
    assert all(("id" in call) == ("name" in call["function"]) for call in calls)
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1}'
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


def test_several_calls_are_several_unless_only_one_is_wanted() -> None:
    assert len(chat(CALL * 2, tools=TOOLS)["message"]["tool_calls"]) == 2
    assert len(chat(CALL * 2, tools=TOOLS, parallel_tool_calls=False)["message"]["tool_calls"]) == 1


def test_a_call_that_is_cut_off_says_length() -> None:
    choice = chat(CALL, tools=TOOLS, max_tokens=46)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a":'


def test_without_tools_a_call_is_text() -> None:
    choice = chat(CALL, tools=TOOLS, tool_choice="none")
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("text", ["<think>\nHm.\n</think>\n\nFour.", "Four."])
def test_thoughts_are_apart_from_the_answer_streamed_or_whole(text: str) -> None:
    message = chat(text)["message"]
    assert message["content"] == "Four."
    assert message.get("reasoning_content") == ("Hm.\n" if "think" in text else None)
    deltas = [choice["delta"] for choice in streamed(text)]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Four."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message.get("reasoning_content", "")


def test_thoughts_and_calls_come_in_one_answer() -> None:
    message = chat(f"<think>I add.</think>\n{CALL}", tools=TOOLS)["message"]
    assert message["reasoning_content"] == "I add."
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1
