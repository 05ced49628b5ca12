"""Request bodies that nobody means well: valid ones with some fields spoiled, drawn from a seed."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]
DEEP = 3000
"""Levels of nesting; beyond what Python's own JSON reader follows, three times."""
GIANT = 200_000
"""Characters of a text that no context holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fuzzed:
    """One request."""

    path: str
    content: bytes

    def __repr__(self) -> str:
        return f"{self.path} {self.content[:600]!r}"


def nested(depth: int, value: Any = 1) -> Any:
    for level in range(depth):
        value = {"items": value} if level % 2 else [value]
    return value


def nested_schema(depth: int) -> Body:
    schema: Body = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


NUMBERS = [
    *(0, 1, -1, 2, 5, 6, 20, 21, 24, 25, 257, 258, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**400, 0.5, -0.5, 1e-300, 1e300, 1e400, float("nan"), float("inf"), -float("inf"), -0.0, 1.0, 2.0000001),
]
TEXTS = [
    *("", " ", "a", "\0", "\ud800", "a\udfffb", "\uffff", "\U0010ffff", "é" * 300, "<|im_end|>"),
    *("<|im_start|>system\n", "{{ 7 * 7 }}", "{% for x in range(10**9) %}x{% endfor %}", "data: [DONE]\n\n"),
    *("\r\nx-evil: 1", "../../etc/passwd", "none", "auto", "required", "null", "NaN", "1e999", "../"),
    *("a:b@c:d", ":", "@", "\u202e", "\u0000" * 50),
]
SCHEMAS: list[Any] = [
    *({}, True, False, {"type": "object"}, {"type": "array"}, {"type": "banana"}, {"type": 3}, {"$ref": "#"}),
    *({"$ref": "#/nowhere"}, {"$ref": "http://example.invalid/x"}, {"enum": []}, {"enum": [None, 1, "\ud800"]}),
    *({"const": "\ud800"}, {"pattern": "("}, {"type": "string", "pattern": "^(a+)+$"}, {"$defs": []}),
    *({"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": -1}, {"uniqueItems": True}),
    *({"type": "integer", "minimum": 10**400}, {"type": "number", "multipleOf": 0}, {"properties": {"": {}}}),
    *({"type": "array", "minItems": 10**9}, {"type": "integer", "minimum": 5, "maximum": 1}, {"not": {}}),
    *({"allOf": 3}, {"anyOf": []}, {"oneOf": [{}] * 200}, {"if": {}, "then": {}}, {"properties": []}),
    *({"required": ["a"] * 5000}, {"type": "object", "patternProperties": {"[": {}}}, {"type": ["string", "null"]}),
    *({"x-guidance": {"lenient": True}}, {"type": "string", "format": "date-time"}, {"definitions": {"a": 1}}),
    *(nested_schema(3), nested_schema(200), nested_schema(900), nested(DEEP), {"type": "object", "required": "a"}),
    *({"type": "string", "pattern": "(?=a)b"}, {"type": "string", "pattern": "[a-z]{1,100000}"}),
]
FORMATS: list[Callable[[random.Random], Any]] = [
    lambda _: {"type": "json_object"},
    lambda _: {"type": "text"},
    lambda _: {"type": "json_schema"},
    lambda _: {"type": "structural_tag", "structures": [], "triggers": []},
    lambda draw: {"type": "json_schema", "json_schema": {"name": "x", "schema": draw.choice(SCHEMAS)}},
    lambda draw: {"type": "json_schema", "json_schema": {"name": "x", "schema": draw.choice(SCHEMAS)}},
    lambda draw: {"type": draw.choice(TEXTS), "json_schema": draw.choice(SCHEMAS)},
]
NAMED = {"type": "function", "function": {"name": "f"}}
CHOICES: list[Any] = ["none", "auto", "required", "any", NAMED, {"type": "function"}]


def value_of(draw: random.Random) -> Any:
    """Anything."""
    kind = draw.randrange(9)
    if kind == 0:
        return draw.choice([None, True, False, [], {}, [[]], [{}], [None], {"": ""}])
    if kind == 1:
        return [draw.choice(NUMBERS) for _ in range(draw.choice([1, 3, 300, 3000]))]
    if kind == 2:
        return [draw.choice(TEXTS) for _ in range(draw.choice([1, 2, 17, 100]))]
    if kind == 3:
        return {draw.choice(TEXTS): value_of(draw) for _ in range(draw.randrange(4))}
    if kind == 4:
        return [value_of(draw) for _ in range(draw.randrange(4))]
    if kind == 5:
        return nested(draw.choice([2, 30, 400, DEEP]))
    if kind == 6:
        return draw.choice(["x", "\ud83d", "猫", " ", "a b "]) * draw.choice([300, GIANT // 4])
    return draw.choice(NUMBERS) if kind == 7 else draw.choice(TEXTS)


def tool_of(draw: random.Random) -> Any:
    name = draw.choice(["f", "f", "g", *TEXTS])
    function = {"name": name, "description": draw.choice(TEXTS), "parameters": draw.choice(SCHEMAS)}
    function |= {"strict": draw.choice([True, False, None, 1])} if draw.random() < 0.2 else {}
    return (
        value_of(draw) if draw.random() < 0.1 else {"type": draw.choice(["function"] * 5 + ["x"]), "function": function}
    )


def message_of(draw: random.Random) -> Any:
    role = draw.choice(["user", "system", "assistant", "tool", "developer", "function", *TEXTS[:5]])
    parts: list[Any] = [
        {"type": "text", "text": draw.choice(TEXTS)},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
        {"type": draw.choice(TEXTS)},
        {"type": "refusal", "refusal": "no"},
    ]
    message = {
        "role": role,
        "content": draw.choice([draw.choice(TEXTS), draw.choices(parts, k=2), None, value_of(draw)]),
    }
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": draw.choice(["{}", "{", "", "[1]", *TEXTS])},
    }
    extra = {
        "tool_calls": [call],
        "tool_call_id": "1",
        "name": draw.choice(TEXTS),
        "reasoning_content": draw.choice(TEXTS),
    }
    for name in draw.sample(list(extra), draw.randrange(3)):
        message[name] = draw.choice([extra[name], extra[name], value_of(draw)])
    return value_of(draw) if draw.random() < 0.1 else message


def bias_of(draw: random.Random) -> Any:
    return {
        str(draw.choice([*NUMBERS, *TEXTS, 3, 5, "٣"])): draw.choice(NUMBERS) for _ in range(draw.choice([1, 2, 40]))
    }


MEANT: dict[str, Callable[[random.Random], Any]] = {
    "messages": lambda draw: [message_of(draw) for _ in range(draw.choice([0, 1, 2, 3, 60]))],
    "prompt": lambda draw: draw.choice(
        [draw.choice(TEXTS), draw.choices(TEXTS, k=3), draw.choices(NUMBERS, k=3), [[1, 2], [3, draw.choice(NUMBERS)]]]
    ),
    "input": lambda draw: draw.choice(
        [draw.choices(TEXTS, k=2), ["a"] * 3000, [[5] * 300], [draw.choice(NUMBERS)], [[]]]
    ),
    "tokens": lambda draw: draw.choices([*NUMBERS, 1, 2, 3], k=draw.choice([0, 1, 5])),
    "tools": lambda draw: [tool_of(draw) for _ in range(draw.choice([0, 1, 2, 200]))],
    "tool_choice": lambda draw: draw.choice(CHOICES),
    "response_format": lambda draw: draw.choice(FORMATS)(draw),
    "logit_bias": bias_of,
    "stop": lambda draw: draw.choice([draw.choice(TEXTS), draw.choices(TEXTS, k=draw.choice([0, 2, 16, 17]))]),
    "stop_token_ids": lambda draw: draw.choices(NUMBERS, k=3),
    "stream_options": lambda draw: {
        draw.choice(["include_usage", "continuous_usage_stats", "x"]): draw.choice([True, 3])
    },
    "chat_template_kwargs": lambda draw: {
        draw.choice(["messages", "enable_thinking", "tools", "add_generation_prompt", *TEXTS]): value_of(draw)
    },
    "model": lambda draw: draw.choice(TEXTS),
    "n": lambda draw: draw.choice([*NUMBERS, 3, 24]),
}
NUMERIC = (
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "min_tokens", "seed", "n"),
    *("logprobs", "top_logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty", "best_of"),
    *("truncate_prompt_tokens", "prompt_logprobs", "priority", "length_penalty", "dimensions"),
    "thinking_token_budget",
)
FLAGS = (
    *("stream", "echo", "ignore_eos", "logprobs", "skip_special_tokens", "parallel_tool_calls", "use_beam_search"),
    *("include_reasoning", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
    *("return_token_strs", "return_token_ids", "include_stop_str_in_output", "return_tokens_as_token_ids"),
)
OTHER = (
    *("user", "metadata", "suffix", "chat_template", "structured_outputs", "documents", "mm_processor_kwargs"),
    *("allowed_token_ids", "logits_processors", "kv_transfer_params", "vllm_xargs", "cache_salt", "request_id"),
    *("reasoning_effort", "service_tier", "modalities", "audio", "functions", "function_call", "prompt_embeds"),
    *("encoding_format", "guided_json", "guided_regex", "embed_dtype", "repetition_detection", "__class__"),
    *("bad_words", "store", "\ud800", "", "x" * 5000),
)
MILD: dict[str, list[Any]] = {
    "messages": [
        [{"role": "user", "content": text}] for text in ("", "猫", "{{ 7 * 7 }}", "<|im_end|>" * 5, "\0", "x" * 400)
    ],
    "prompt": ["猫", "a\0b", ["a", "b"], [3, 4], [[3], [4, 5]], [257], "x" * 250, "x" * 256],
    "response_format": [
        {"type": "json_object"},
        *({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} for schema in SCHEMAS),
    ],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": schema}}] for schema in SCHEMAS],
    "tool_choice": ["required", "none"],
    "logit_bias": [{"5": 100}, {"5": -100, "6": 3.5}, {str(token): -100 for token in range(258)}, {"257": 1e-9}],
    "stop": ["a", ["a", "\0", "猫"], "猫" * 3000],
    "stop_token_ids": [[5], [257, 0], list(range(258)), [10**9], [-1]],
    "stream_options": [{"include_usage": True}, {}],
    "n": [2, 3, 24],
    "max_tokens": [1, 2, 200, None],
    "max_completion_tokens": [1, 7, 300],
    "temperature": [0, 1, 2, 1e-9, 0.7],
    "top_p": [0, 1e-12, 0.5, 1],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 0.5, 1],
    "min_tokens": [0, 2, 3],
    "seed": [0, -1, 2**63 - 1, 2**63, -(2**63)],
    "logprobs": [True, 0, 5],
    "top_logprobs": [0, 20],
    "repetition_penalty": [0.01, 1, 100],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "stream": [True],
    "ignore_eos": [True],
    "encoding_format": ["base64", "float"],
    "tokens": [[], [0, 1, 257]],
    "input": [["a", [3]], [[3], [4]], "x" * 256, ["a"] * 200],
}
"""What may well be meant; some of it is refused."""
PATHS: dict[str, Body] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [3, 4]},
}
CHAT_ONLY = {"messages", "tools", "tool_choice", "top_logprobs", "max_completion_tokens"}
NOT_ANSWERS = {"tokens", "input", "encoding_format"}
READ = {
    "/v1/chat/completions": set(MILD) - NOT_ANSWERS - {"prompt"},
    "/v1/completions": set(MILD) - NOT_ANSWERS - CHAT_ONLY,
    "/v1/embeddings": {"input", "encoding_format"},
    "/tokenize": {"prompt"},
    "/detokenize": {"tokens"},
}
"""Fields of each route."""
WEIGHTS = (10, 6, 2, 2, 1)


def fuzzed(models: Sequence[str], *, seed: int, count: int) -> Iterator[Fuzzed]:
    """Yield `count` requests to an application that serves `models`; the same for the same seed."""
    draw = random.Random(seed)  # noqa: S311
    for _ in range(count):
        (path,) = draw.choices(list(PATHS), WEIGHTS)
        yield Fuzzed(path=path, content=content_of(draw, path, {"model": draw.choice(models), **PATHS[path]}))


def content_of(draw: random.Random, path: str, body: Body) -> bytes:
    usual = [name for name in MILD if name in READ[path]]
    for _ in range(draw.choice([1, 1, 2, 2, 3, 5])):
        name = draw.choice(usual if draw.random() < 0.6 else [*MEANT, *NUMERIC, *FLAGS, *draw.sample(OTHER, 8)])
        body[name] = spoiled(draw, name)
    if draw.random() < 0.03:
        del body[draw.choice(list(body))]
    anything: Any = value_of(draw) if draw.random() < 0.02 else body
    content = json_of(anything)
    return damaged(draw, content) if draw.random() < 0.06 else content


def spoiled(draw: random.Random, name: str) -> Any:
    if name in MILD and draw.random() < 0.6:
        return draw.choice(MILD[name])
    if draw.random() < 0.25:
        return value_of(draw)
    if name in MEANT:
        return MEANT[name](draw)
    if name in NUMERIC:
        return draw.choice(NUMBERS)
    return (
        draw.choice([True, True, False, None, 1])
        if name in FLAGS
        else draw.choice([draw.choice(TEXTS), value_of(draw)])
    )


def json_of(value: Any) -> bytes:
    """Write `value` as JSON, infinite numbers as numbers too large, nesting beyond Python's own writer spelled out."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = '{"model": "x", "messages": ' + "[" * DEEP + "]" * DEEP + "}"
    return text.replace("Infinity", "1e999").encode()


def damaged(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return draw.choice(
        [
            content[:place],
            content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
            content + content,
            b"",
            b"\xff\xfe" + content,
            content.decode().encode("utf-16"),
            b"[" * 100_000,
        ]
    )
