"""Log-probabilities of tokens, from the engine's numbers to those beside a text."""

from collections import deque
from dataclasses import dataclass

from serve_apps.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """One token of an answer under the model's own distribution: no temperature, penalty, bias or grammar."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens at this place with their log-probabilities, descending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A token as clients see it."""

    token: str
    data: bytes
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedLogprobs:
    """A token of an answer, its place in the text, and what might have stood there."""

    chosen: Candidate
    top: tuple[Candidate, ...]
    text_offset: int
    """Characters of the answer before it."""


class LogprobStream:
    """Gives the log-probabilities of one answer out with the text of their tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: deque[PlacedLogprobs] = deque()
        self._num_chars = 0  # given out

    def add(self, logprobs: TokenLogprobs, *, text_offset: int) -> None:
        """Take in the next token; `text_offset` is the length of the text before it, given out or not."""
        top = tuple(self._candidate(token_id, logprob) for token_id, logprob in logprobs.top)
        chosen = self._candidate(logprobs.token_id, logprobs.logprob)
        self._waiting.append(PlacedLogprobs(chosen=chosen, top=top, text_offset=text_offset))

    def release(self, new_text: str, *, is_last: bool) -> tuple[PlacedLogprobs, ...]:
        """Return the tokens that begin in the text up to the end of `new_text`; at the end, all that are left."""
        self._num_chars += len(new_text)
        released = []
        while self._waiting and (is_last or self._waiting[0].text_offset < self._num_chars):
            released.append(self._waiting.popleft())
        return tuple(released)

    def _candidate(self, token_id: int, logprob: float) -> Candidate:
        data, token = self._vocabulary.bytes_of(token_id), self._vocabulary.text_of(token_id)
        return Candidate(token=token, data=data, logprob=logprob)
