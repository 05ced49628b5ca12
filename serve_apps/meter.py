"""Counts tokens and times on answers as they pass through the ingress, the same way for every engine."""

import json
import time
from typing import Any

from pydantic import BaseModel
from vllm.entrypoints.generate.base.protocol import StreamOptions

from serve_apps.call import Call


class Meter:
    """Reads the usage off one answer into its call.

    Only the engine counts tokens exactly, and in a stream it says them in a last event that the client has to ask
    for. So every stream is asked for it, and the event is taken out again where the client did not want it.
    """

    def __init__(self, call: Call, body: BaseModel) -> None:
        self._call = call
        given = getattr(body, "stream_options", None)
        options = given if isinstance(given, StreamOptions) else None  # else it is anything, on a body without streams
        self._is_usage_wanted = options is not None and bool(options.include_usage)
        call.is_stream = bool(getattr(body, "stream", False))
        if call.is_stream and not self._is_usage_wanted:
            # Beside what else the client may have set, which the engine has yet to check.
            fields = {} if options is None else options.model_dump()
            vars(body)["stream_options"] = StreamOptions(**(fields | {"include_usage": True}))

    def read(self, item: Any) -> Any:
        """Return `item`, a response object or the text of events, as the client is to see it."""
        if self._call.first_token_s is None:
            self._call.first_token_s = time.monotonic() - self._call.begin_s
        if isinstance(item, list):
            return "".join(self._read_events(text) for text in item)
        if isinstance(item, str):
            return self._read_events(item)
        if (usage := getattr(item, "usage", None)) is not None:
            self._note(usage.prompt_tokens, getattr(usage, "completion_tokens", 0) or 0)
        return item

    def _read_events(self, text: str) -> str:
        if '"usage"' not in text:  # inside a string it would be escaped, so this is a key
            return text
        events = text.split("\n\n")
        return "\n\n".join(event for event in events if not self._takes_out(event))

    def _takes_out(self, event: str) -> bool:
        data = event.removeprefix("data: ")
        body = json.loads(data) if data.startswith("{") else {}
        if body.get("choices") != [] or not body.get("usage"):
            return False
        self._note(body["usage"]["prompt_tokens"], body["usage"].get("completion_tokens", 0))
        return not self._is_usage_wanted

    def _note(self, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        self._call.is_complete = True
        self._call.num_prompt_tokens = num_prompt_tokens
        self._call.num_completion_tokens = num_completion_tokens
