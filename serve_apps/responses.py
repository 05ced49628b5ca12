"""OpenAI's response bodies, whole and in pieces."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve_apps.logprobs import Candidate, PlacedLogprobs
from serve_apps.tool_calls import CallDelta

Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageDelta:
    """What new text adds to an assistant's message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """New text of one answer."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: str | None = None
    """The stop string that ended it."""
    message: MessageDelta | None = None
    """The text taken apart; None where it is the content as it is."""
    logprobs: tuple[PlacedLogprobs, ...] = ()
    """Of the tokens of the text, if they are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What all bodies of one response share."""

    endpoint: Endpoint
    response_id: str
    created: int
    """Unix seconds."""
    model: str
    """The served name, with the adapter's version."""

    def body(self, choices: list[dict[str, Any]], *, is_chunk: bool) -> dict[str, Any]:
        """Return a body around `choices`."""
        whole = "chat.completion" if self.endpoint == "chat" else "text_completion"
        kind = "chat.completion.chunk" if is_chunk and self.endpoint == "chat" else whole
        ids = {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}
        return ids | {"choices": choices}


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """Return the `usage` object."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def whole(head: Head, pieces: Iterable[Piece], counts: dict[str, int]) -> dict[str, Any]:
    """Return the body of a response that is not streamed; `pieces` hold each answer in full."""
    choices = []
    for piece in pieces:
        ends = {"index": piece.index, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        chat = {"message": {"role": "assistant"} | _message(piece)}
        answer = chat if head.endpoint == "chat" else {"text": piece.text}
        choices.append(ends | answer | _logprobs(head.endpoint, piece.logprobs))
    return head.body(choices, is_chunk=False) | {"usage": counts}


def role_events(head: Head, num_answers: int) -> str:
    """Return the server-sent events that open a chat stream; a completion has none."""
    if head.endpoint != "chat":
        return ""
    opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    return "".join(event(head.body([{"index": i} | opening], is_chunk=True)) for i in range(num_answers))


def piece_event(head: Head, piece: Piece) -> str:
    """Return the server-sent event of new text, or of an answer's end."""
    choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason}
    if head.endpoint == "chat":
        choice["delta"] = _delta(piece)
    else:
        choice["text"] = piece.text
    if piece.stop_reason is not None:
        choice["stop_reason"] = piece.stop_reason
    choice.update(_logprobs(head.endpoint, piece.logprobs))
    return event(head.body([choice], is_chunk=True))


def _message(piece: Piece) -> dict[str, Any]:
    if piece.message is None:
        return {"content": piece.text}
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in piece.message.calls
    ]
    message: dict[str, Any] = {"content": piece.message.content or (None if calls else "")}
    if piece.message.reasoning:
        message["reasoning_content"] = piece.message.reasoning
    return message | ({"tool_calls": calls} if calls else {})


def _delta(piece: Piece) -> dict[str, Any]:
    message = piece.message or MessageDelta(content=piece.text)
    delta: dict[str, Any] = {}
    if message.content:
        delta["content"] = message.content
    if message.reasoning:
        delta["reasoning_content"] = message.reasoning
    if message.calls:
        delta["tool_calls"] = [_call_delta(call) for call in message.calls]
    return delta


def _call_delta(call: CallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.call_id, "type": "function", "function": {"name": call.name} | function}


def _logprobs(endpoint: Endpoint, tokens: Sequence[PlacedLogprobs]) -> dict[str, Any]:
    """Return the `logprobs` field of a choice, nothing if there are none."""
    if not tokens:
        return {}
    if endpoint == "chat":
        content = [_candidate(one.chosen) | {"top_logprobs": [_candidate(top) for top in one.top]} for one in tokens]
        return {"logprobs": {"content": content, "refusal": None}}
    columns = {
        "tokens": [one.chosen.token for one in tokens],
        "token_logprobs": [_finite(one.chosen.logprob) for one in tokens],
        "top_logprobs": [_by_token(one) for one in tokens],
        "text_offset": [one.text_offset for one in tokens],
    }
    return {"logprobs": columns}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.token, "logprob": _finite(candidate.logprob), "bytes": list(candidate.data)}


def _by_token(one: PlacedLogprobs) -> dict[str, float]:
    """Return the likeliest tokens; the chosen one is always among them, as in OpenAI's completions."""
    by_token: dict[str, float] = {}
    for candidate in (*one.top, one.chosen):
        by_token.setdefault(candidate.token, _finite(candidate.logprob))
    return by_token


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # OpenAI's word for impossible; JSON has no infinity


def usage_event(head: Head, counts: dict[str, int]) -> str:
    """Return the event that `stream_options.include_usage` asks for: no choices, the counts."""
    return event(head.body([], is_chunk=True) | {"usage": counts})


def error_body(message: str, *, kind: str, param: str | None, code: str | int | None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
"""The event that ends a stream."""
