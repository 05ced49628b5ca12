"""Calls of tools in the text of an answer, taken out as they come.

Every format of the catalog is JSON objects `{"name": …, "arguments": {…}}` in some frame:

- `hermes` (Qwen2.5 and many others): `<tool_call>` object `</tool_call>`, after text or nothing.
- `llama3_json` (Llama 3.1): the answer is an object, or several separated by `;`; `parameters` for `arguments`.
- `json_list`: the answer is a JSON list of objects, which a grammar has forced.
"""

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serve_apps.reasoning import cut

CallFormat = Literal["hermes", "llama3_json", "json_list"]
BEGIN, END = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
"""The usual order of an object: once the name is known, the arguments can be sent while they are written."""
FRAMES: dict[CallFormat, str] = {"hermes": r"\s*", "llama3_json": r"[\s;]*", "json_list": r"[\s\[\],]*"}
State = Literal["text", "frame", "object"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CallDelta:
    """New text of one call; the first of a call has its id and name."""

    index: int
    arguments: str
    call_id: str | None = None
    name: str | None = None


class CallStream:
    """Splits an answer's text into content and calls; what it has given out is never taken back.

    Text that looks like a call and is none, or calls a function that was not offered, stays content.
    """

    def __init__(self, call_format: CallFormat, names: frozenset[str], *, max_calls: int | None = None) -> None:
        self._format = call_format
        self._names = names
        self._max_calls = max_calls
        self._state: State = "text" if call_format == "hermes" else "frame"
        self._held = ""
        self._frame = ""  # what stands around objects, given out as content if no call comes of it
        self._object = _Object()
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool) -> tuple[str, list[CallDelta]]:
        """Return the content and the calls that are certain now; at the end nothing is held back."""
        self._held += text
        content = ""
        calls: list[CallDelta] = []
        while self._held:
            before = (self._state, len(self._held))
            if self._state == "object":
                content += self._read_object(calls)
            else:
                content += self._read_frame() if self._state == "frame" else self._read_text()
            if before == (self._state, len(self._held)):
                break  # what is held cannot be judged yet
        return (content + self._rest() if is_last else content), calls

    def _read_text(self) -> str:
        if self._format != "hermes":  # no call can follow
            text, self._held = self._held, ""
            return text
        before, rest, is_found = cut(self._held, BEGIN)
        text = before.rstrip()  # white space may stand before a call
        if is_found:
            self._frame, self._held, self._state = before[len(text) :] + BEGIN, rest, "frame"
        else:
            self._held = before[len(text) :] + rest
        return text

    def _read_frame(self) -> str:
        match = re.match(FRAMES[self._format], self._held)
        assert match is not None
        self._frame += match.group()
        self._held = self._held[match.end() :]
        if self._held.startswith("{"):
            self._state, self._object = "object", _Object()
        elif self._format == "hermes" and self.num_calls and END.startswith(self._held[: len(END)]):
            if len(self._held) >= len(END):
                self._frame, self._held, self._state = "", self._held[len(END) :], "text"
        elif self._held:
            return self._give_up()
        return ""

    def _read_object(self, calls: list[CallDelta]) -> str:
        now = self._object
        self._held = self._held[now.read(self._held) :]
        if now.name is None and not now.is_complete:
            return ""
        if now.name not in self._names:
            self._held = now.text + self._held
            return self._give_up()
        if self._may_call():
            calls += now.deltas(self.num_calls)
        if now.is_complete:
            self.num_calls += 1
            self._frame, self._state = "", "frame"
        return ""

    def _may_call(self) -> bool:
        return self._max_calls is None or self.num_calls < self._max_calls

    def _give_up(self) -> str:
        """Return the frame as content; what it held is text."""
        text, self._frame, self._state = self._frame, "", "text"
        return text

    def _rest(self) -> str:
        if self._state == "object":
            is_call = self._object.is_announced or not self._may_call()
            return "" if is_call else self._frame + self._object.text
        rest = self._frame + self._held
        is_frame = self._state == "frame" or not rest.strip()
        return "" if is_frame and self.num_calls else rest


class _Object:
    """One JSON object, read piece by piece."""

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.is_announced = False
        """Whether its name has been given out."""
        self.is_complete = False
        self._depth = 0
        self._is_head_read = False
        self._is_string = False
        self._is_escaped = False
        self._arguments = ""
        self._arguments_begin: int | None = None
        self._arguments_end: int | None = None
        self._num_sent = 0

    def read(self, text: str) -> int:
        """Take in `text` up to the end of the object; return how much of it that is."""
        for place, char in enumerate(text):
            self.text += char
            self._scan(char)
            if self.is_complete:
                self._end()
                return place + 1
        return len(text)

    def deltas(self, index: int) -> Iterator[CallDelta]:
        """Yield what has not been given out yet."""
        arguments = self._arguments
        if self._arguments_begin is not None:
            arguments = self.text[self._arguments_begin : self._arguments_end]
        if not self.is_announced:
            self.is_announced = True
            self._num_sent = len(arguments)
            yield CallDelta(index=index, call_id=f"call_{uuid.uuid4().hex[:24]}", name=self.name, arguments=arguments)
        elif len(arguments) > self._num_sent:
            new, self._num_sent = arguments[self._num_sent :], len(arguments)
            yield CallDelta(index=index, arguments=new)

    def _scan(self, char: str) -> None:
        if self._is_string:
            self._is_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
            return
        if char == '"':
            self._is_string = True
        elif char in "{[":
            self._depth += 1
            if self._depth == 2 and not self._is_head_read:
                self._is_head_read = True
                if char == "{" and (head := HEAD.fullmatch(self.text[:-1])):
                    self.name, self._arguments_begin = head.group(1), len(self.text) - 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1 and self._arguments_begin is not None and self._arguments_end is None:
                self._arguments_end = len(self.text)
            self.is_complete = self._depth == 0

    def _end(self) -> None:
        """Read the name and arguments of an object in another order than the usual."""
        if self.name is not None:
            return
        try:
            call = json.loads(self.text)
        except (json.JSONDecodeError, RecursionError):
            return
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(call.get("name"), str):
            self.name = call["name"]
            self._arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
