"""The message of an assistant, from the text of an answer as it comes."""

from dataclasses import dataclass, replace

from serve_apps.reasoning import Thinking, ThinkStream
from serve_apps.responses import MessageDelta, Piece
from serve_apps.tool_calls import CallFormat, CallStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the text of an answer may hold besides its content."""

    thinking: Thinking = "never"
    call_format: CallFormat | None = None
    names: frozenset[str] = frozenset()
    """Functions that may be called."""
    max_calls: int | None = None


PLAIN = Reading()
"""The text is the content."""
NOTHING = MessageDelta()


class MessageStreams:
    """Takes the answers of one request apart, first thinking from the rest, then calls from content."""

    def __init__(self, reading: Reading, num_answers: int) -> None:
        self._is_plain = reading == PLAIN
        self._thinking = [ThinkStream(reading.thinking) for _ in range(num_answers)]
        self._calls: list[CallStream] = []
        if reading.call_format is not None:
            self._calls = [
                CallStream(reading.call_format, reading.names, max_calls=reading.max_calls) for _ in range(num_answers)
            ]

    def read(self, pieces: list[Piece]) -> list[Piece]:
        """Return `pieces` with what their texts add to the messages; those that add nothing yet are left out."""
        if self._is_plain:
            return pieces
        return [p for p in map(self._read, pieces) if p.finish_reason or p.logprobs or p.message != NOTHING]

    def _read(self, piece: Piece) -> Piece:
        is_last = piece.finish_reason is not None
        reasoning, content = self._thinking[piece.index].push(piece.text, is_last=is_last)
        if not self._calls:
            return replace(piece, message=MessageDelta(reasoning=reasoning, content=content))
        calls = self._calls[piece.index]
        content, deltas = calls.push(content, is_last=is_last)
        message = MessageDelta(reasoning=reasoning, content=content, calls=tuple(deltas))
        has_called = calls.num_calls and piece.finish_reason == "stop"
        return replace(piece, message=message, finish_reason="tool_calls" if has_called else piece.finish_reason)
