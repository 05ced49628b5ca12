import json
from random import Random
from typing import Annotated, Any

import jsonschema
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from test_vocabulary import sentencepiece_tokenizer
from tiny_models import IM_END, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from serve_apps.grammar import MAX_SCHEMA_CHARS, CompiledGrammar, Grammar, compile_grammar
from serve_apps.refusals import Refusal

TOKENIZER = byte_tokenizer()


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")

    street: str = Field(max_length=5)
    zip_code: str = Field(pattern="^[0-9]{3}-[0-9]{4}$")


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=4)
    age: int = Field(ge=0, le=120)
    address: Address | None = None
    tags: list[Annotated[str, Field(max_length=3)]] = Field(default=[], max_length=2)


SCHEMAS: dict[str, dict[str, Any]] = {
    "pydantic": Person.model_json_schema(),
    "enum": {"enum": ["red", 3, None, {"a": [1]}]},
    "numbers": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 70}, "maxItems": 3},
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id"],
        "additionalProperties": False,
    },
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "string", "minLength": 2, "maxLength": 3}]},
    "recursive": {
        "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
        "$ref": "#/$defs/node",
    },
}

KEYWORDS = ["type", "properties", "items", "required", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "minimum"]
KEYWORDS += ["maxLength", "pattern", "format", "additionalProperties", "minItems", "not", "if", "x-guidance", "a"]


def compiled(schema: dict[str, Any], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> CompiledGrammar:
    return compile_grammar(Grammar.from_json_schema(schema), tokenizer, (IM_END,))


def walk(grammar: CompiledGrammar, seed: int) -> str:
    """A text drawn evenly from the bytes that the grammar allows, the end of the text as one of them."""
    generator = torch.Generator().manual_seed(seed)
    state = grammar.start()
    token_ids: list[int] = []
    for _ in range(5000):
        scores = torch.zeros(len(TOKENIZER))
        state.mask(scores)
        token_id = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        if token_id == IM_END:
            break
        state.accept(token_id)
        token_ids.append(token_id)
    assert state.error is None
    return str(TOKENIZER.decode(token_ids))


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_keeps_the_schema(name: str) -> None:
    grammar = compiled(SCHEMAS[name])
    texts = {walk(grammar, seed) for seed in range(10)}
    assert len(texts) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())


def test_answers_of_one_grammar_do_not_disturb_each_other() -> None:
    grammar = compiled({"enum": [17, 42]})
    first, second = grammar.start(), grammar.start()
    for state, text in ((first, "17"), (second, "42")):
        for token_id in TOKENIZER(text).input_ids:
            scores = torch.zeros(len(TOKENIZER))
            state.mask(scores)
            assert scores[token_id] == 0
            state.accept(token_id)


def test_only_the_end_follows_a_finished_text() -> None:
    state = compiled({"const": 7}).start()
    (seven,) = TOKENIZER("7").input_ids
    state.accept(seven)
    scores = torch.zeros(len(TOKENIZER) + 6)  # an embedding that is wider than the vocabulary
    state.mask(scores)
    assert scores.isfinite().nonzero().flatten().tolist() == [IM_END]
    state.accept(IM_END)
    assert state.error is None


def test_white_space_does_not_go_on_for_ever() -> None:
    state = compiled({"type": "object"}).start()
    for token_id in TOKENIZER('{"a": ').input_ids:
        state.accept(token_id)
    scores = torch.zeros(len(TOKENIZER))
    state.mask(scores)
    assert state.error is None
    assert scores[TOKENIZER("7").input_ids[0]] == 0
    for space in " \n\t":
        assert scores[TOKENIZER(space).input_ids[0]] == -torch.inf


def test_an_answer_that_has_left_its_grammar_says_so_and_can_only_end() -> None:
    state = compiled({"type": "object"}).start()
    state.accept(TOKENIZER("x").input_ids[0])
    scores = torch.zeros(len(TOKENIZER))
    state.mask(scores)
    assert scores.isfinite().nonzero().flatten().tolist() == [IM_END]
    assert state.error


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
        ({"type": "string", "format": "no such format"}, "no such format"),
        ({"type": "string", "pattern": "^(?!a).*$"}, "look-ahead"),
        ({"type": "strng"}, "strng"),
        ({"$ref": "#/$defs/nothing"}, "nothing"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"enum": ["x" * MAX_SCHEMA_CHARS]}, "longer than"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_the_reason(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal) as caught:
        compiled(schema)
    assert caught.value.param == "response_format"
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def any_value(random: Random, depth: int = 0) -> Any:
    """JSON that looks like parts of a schema, seldom in the right place."""
    words = ["type", "object", "string", "#", "#/$defs/a", "^a+$", "(", "", 0, -1, 1e308, 2**70, None, True, "\ud800"]
    if depth > 4 or random.random() < 0.4:
        return random.choice(words)
    parts = [any_value(random, depth + 1) for _ in range(random.randrange(4))]
    return parts if random.random() < 0.3 else dict(zip(random.choices(KEYWORDS, k=4), parts, strict=False))


def test_whatever_is_sent_as_a_schema_is_bound_or_refused() -> None:
    counts = {True: 0, False: 0}
    for seed in range(500):
        random = Random(seed)  # noqa: S311
        try:
            compiled({random.choice(KEYWORDS): any_value(random) for _ in range(random.randrange(3))}).start()
            counts[True] += 1
        except Refusal:
            counts[False] += 1
    assert min(counts.values()) > 25


def test_nesting_without_end_is_refused() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(Refusal, match="response_format"):
        compiled(schema)


def test_a_model_that_cannot_end_cannot_be_bound() -> None:
    with pytest.raises(Refusal, match="no stop token"):
        compile_grammar(Grammar.from_json_schema({"type": "object"}), TOKENIZER, ())


def test_what_a_vocabulary_cannot_write_is_refused() -> None:
    tokenizer = sentencepiece_tokenizer(has_byte_tokens=False)
    with pytest.raises(Refusal, match="response_format"):
        compile_grammar(Grammar.from_json_schema({"const": "研"}), tokenizer, (tokenizer.eos_token_id,))


@pytest.mark.parametrize("has_byte_tokens", [True, False])
def test_a_sentencepiece_vocabulary_is_bound_too(has_byte_tokens: bool) -> None:
    tokenizer = sentencepiece_tokenizer(has_byte_tokens=has_byte_tokens)
    end = tokenizer.eos_token_id
    grammar = compile_grammar(Grammar.from_json_schema({"const": {"b": 1}}), tokenizer, (end,))
    state, written = grammar.start(), b""
    for _ in range(50):
        scores = torch.arange(len(tokenizer), dtype=torch.float32).neg()  # real pieces before single bytes
        state.mask(scores)
        token_id = int(scores.argmax())
        if token_id == end:
            break
        state.accept(token_id)
        written += tokenizer.convert_ids_to_tokens(token_id).replace("▁", " ").encode()
    assert json.loads(written) == {"b": 1}
