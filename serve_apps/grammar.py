"""Grammars that bind an answer, compiled by llguidance.

llguidance refuses a JSON schema that it cannot keep, where xgrammar drops keywords (`uniqueItems`, `if`, `minLength`
beside `pattern`) with a warning at most; it compiles in milliseconds, works out masks as they are needed, and bounds
the work of both.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from serve_apps.refusals import Refusal
from serve_apps.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # in its stub only

MAX_SCHEMA_CHARS = 64 * 1024
"""Longer schemas take seconds to compile, and their masks tens of milliseconds of every pass."""
JSON_OPTIONS: "JsonCompileOptions" = {
    # One line, with or without spaces: any white space would be valid, and small models fall into writing nothing else.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # A schema may ask for these itself, under `x-guidance`; then it would not be kept.
    "lenient": False,
    "coerce_one_of": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """The form that an answer has to have."""

    json_schema: str
    """The schema of the JSON text that is wanted, as JSON."""
    param: str
    """The field of the request that asks for it; refusals name it."""

    @classmethod
    def from_json_schema(cls, schema: dict[str, Any], *, param: str = "response_format") -> Self:
        """Return the grammar of the JSON texts that `schema` describes; raises `Refusal` if it is nested too deep."""
        try:
            return cls(json_schema=json.dumps(schema, ensure_ascii=False), param=param)
        except RecursionError as error:
            raise Refusal(f"{param} cannot be kept: its schema is nested too deep.", param=param) from error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompiledGrammar:
    """A grammar in the tokens of one model; one object serves any number of answers."""

    grammar: Grammar
    matcher: LLMatcher

    def start(self) -> "GrammarState":
        """Return the state of an answer that has no token yet."""
        return GrammarState(self.matcher.deep_copy())


class GrammarState:
    """How far one answer is within its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, scores: torch.Tensor) -> None:
        """Set the `scores` [V] of tokens that cannot follow to -inf; where the grammar ends, stop tokens are left."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(scores)]).to(scores.device)
        known = scores[: len(allowed)]
        known.masked_fill_(allowed == 0, -torch.inf)
        scores[len(allowed) :] = -torch.inf  # rows of the embedding that stand for no token

    def accept(self, token_id: int) -> None:
        """Go on to the place behind `token_id`, which the last mask allowed."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)

    @property
    def error(self) -> str | None:
        """Return why the answer cannot be bound any more; masks then allow stop tokens only."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None


@lru_cache(maxsize=128)
def compile_grammar(
    grammar: Grammar, tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...]
) -> CompiledGrammar:
    """Return `grammar` in the tokens of `tokenizer`; a text that follows it ends in one of `stop_token_ids`.

    May take a second the first time, then milliseconds; any thread may call it, and others go on meanwhile.

    Raises:
        Refusal: the grammar is too long, cannot be kept, or contradicts itself.
    """
    if len(grammar.json_schema) > MAX_SCHEMA_CHARS:
        raise _refusal(grammar, f"its schema is longer than {MAX_SCHEMA_CHARS} characters")
    if not stop_token_ids:
        raise _refusal(grammar, "this model has no stop token to end it with")
    try:
        text = LLMatcher.grammar_from_json_schema(grammar.json_schema, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise _refusal(grammar, str(error)) from error
    matcher = LLMatcher(_tokens_of(tokenizer, stop_token_ids), text, log_level=0)
    matcher.compute_bitmask()  # the first mask brings out what compiling alone does not
    if matcher.is_error():
        raise _refusal(grammar, _first_line(matcher.get_error()))
    return CompiledGrammar(grammar=grammar, matcher=matcher)


@lru_cache(maxsize=8)
def _tokens_of(tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...]) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, stop_token_ids[0])), eos_token=list(stop_token_ids))


class _Tokens:
    """A tokenizer as llguidance reads it; its own reader knows no sentencepiece model without byte tokens."""

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_id: int) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self.eos_token_id = eos_token_id
        self.tokens = [vocabulary.bytes_of(token_id) for token_id in range(len(tokenizer))]
        self.special_token_ids = vocabulary.special_token_ids
        self._tokenizer = tokenizer
        special = set(self.special_token_ids)
        self._by_bytes = {data: i for i, data in enumerate(self.tokens) if i not in special}
        self._max_bytes = max(map(len, self.tokens))

    def __call__(self, text: str) -> list[int]:
        """Return tokens that write exactly `text`; where a grammar leaves no choice, llguidance asks for the next one.

        Raises:
            ValueError: no tokens write it.
        """
        # Behind a character that joins nothing, sentencepiece adds no space of its own.
        for lead in ("", "\x02"):
            written = self._encode(lead + text)[len(self._encode(lead)) :]
            if b"".join(self.tokens[token_id] for token_id in written) == text.encode():
                return written
        return self._longest_first(text.encode())

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _longest_first(self, text: bytes) -> list[int]:
        written = []
        while text:
            ends = range(min(len(text), self._max_bytes), 0, -1)
            token_id = next((found for end in ends if (found := self._by_bytes.get(text[:end])) is not None), None)
            if token_id is None:
                raise ValueError(f"no token writes {text[:1]!r}")
            written.append(token_id)
            text = text[len(self.tokens[token_id]) :]
        return written


def _refusal(grammar: Grammar, reason: str) -> Refusal:
    return Refusal(f"{grammar.param} cannot be kept: {reason}.", param=grammar.param)


def _first_line(error: str) -> str:
    """Return the error without the parser's state and backtrace, which follow it."""
    if error.startswith("panic"):  # a bound of the library, or text that no token of the model writes
        return "it is beyond what this model's grammars can do"
    return " ".join(error.split("<")[0].split())[:300].rstrip(".")
