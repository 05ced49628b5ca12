import json
import math
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from ray.serve.llm.openai_api_models import ChatCompletionResponse, CompletionResponse
from tiny_models import byte_tokenizer

from serve_apps import responses
from serve_apps.logprobs import LogprobStream, PlacedLogprobs, TokenLogprobs
from serve_apps.responses import Endpoint, Head, Piece
from serve_apps.stops import TextStream
from serve_apps.vocabulary import Vocabulary

TOKENIZER = byte_tokenizer()
HEADS: dict[Endpoint, Head] = {
    "chat": Head(endpoint="chat", response_id="x", created=1, model="m"),
    "completions": Head(endpoint="completions", response_id="x", created=1, model="m"),
}
A, B, C = TOKENIZER("abc").input_ids


def released(text: str, stop: list[str] | None = None) -> list[tuple[str, str, list[int]]]:
    """For every byte of `text` and for the end: new text, the tokens that come with it, and their offsets."""
    stream = TextStream(TOKENIZER.decode, stop or ())
    logprobs = LogprobStream(Vocabulary(TOKENIZER))
    steps = []
    for token_id in TOKENIZER(text).input_ids:
        logprobs.add(TokenLogprobs(token_id=token_id, logprob=-1.0, top=()), text_offset=stream.num_chars)
        steps.append((new := stream.push([token_id]), logprobs.release(new, is_last=False)))
    steps.append((new := stream.finish(), logprobs.release(new, is_last=True)))
    return [(new, "".join(one.chosen.token for one in out), [one.text_offset for one in out]) for new, out in steps]


def test_logprobs_come_with_the_text_of_their_tokens() -> None:
    assert released("ab") == [("a", "a", [0]), ("b", "b", [1]), ("", "", [])]


def test_bytes_of_a_character_come_together() -> None:
    assert released("研b") == [
        ("", "", []),
        ("", "", []),
        ("研", r"\xe7\xa0\x94", [0, 0, 0]),
        ("b", "b", [1]),
        ("", "", []),
    ]


def test_logprobs_of_held_text_are_held_too() -> None:
    assert released("xEN.", ["END"]) == [
        ("x", "x", [0]),
        ("", "", []),
        ("", "", []),
        ("EN.", "EN.", [1, 2, 3]),
        ("", "", []),
    ]


def test_tokens_of_a_stop_string_come_at_the_end_as_they_count_in_usage() -> None:
    assert released("xEND", ["END"]) == [
        ("x", "x", [0]),
        ("", "", []),
        ("", "", []),
        ("", "", []),
        ("", "END", [1, 2, 3]),
    ]


def placed(*tokens: TokenLogprobs) -> tuple[PlacedLogprobs, ...]:
    stream = LogprobStream(Vocabulary(TOKENIZER))
    for place, token in enumerate(tokens):
        stream.add(token, text_offset=place)
    return stream.release("", is_last=True)


LIKELY = TokenLogprobs(token_id=A, logprob=-0.5, top=((A, -0.5), (B, -1.5)))
UNLIKELY = TokenLogprobs(token_id=C, logprob=-math.inf, top=((A, -0.5), (B, -1.5)))


def whole(endpoint: Endpoint) -> dict[str, Any]:
    piece = Piece(index=0, text="ac", finish_reason="stop", logprobs=placed(LIKELY, UNLIKELY))
    body = responses.whole(HEADS[endpoint], [piece], responses.usage(1, 2))
    json.dumps(body, allow_nan=False)
    return body


def test_a_chat_tells_logprobs_token_by_token() -> None:
    body = whole("chat")
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "b", "logprob": -1.5, "bytes": [98]}]
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top},
            {"token": "c", "logprob": -9999.0, "bytes": [99], "top_logprobs": top},
        ],
        "refusal": None,
    }
    assert ChatCompletion.model_validate(body).choices[0].logprobs is not None
    kept = ChatCompletionResponse.model_validate(body).model_dump()["choices"][0]["logprobs"]
    assert kept == body["choices"][0]["logprobs"]


def test_a_completion_tells_logprobs_in_columns_with_the_chosen_token_always_among_them() -> None:
    body = whole("completions")
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "c"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"a": -0.5, "b": -1.5, "c": -9999.0}],
        "text_offset": [0, 1],
    }
    assert Completion.model_validate(body).choices[0].logprobs is not None
    kept = CompletionResponse.model_validate(body).model_dump()["choices"][0]["logprobs"]
    assert kept == body["choices"][0]["logprobs"]


def test_a_chunk_has_the_logprobs_of_its_text_and_without_them_no_field() -> None:
    def chunk(piece: Piece) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(responses.piece_event(HEADS["chat"], piece).removeprefix("data: "))
        return body

    body = chunk(Piece(index=0, text="a", logprobs=placed(LIKELY)))
    told = ChatCompletionChunk.model_validate(body).choices[0].logprobs
    assert told is not None
    assert [one.token for one in told.content or []] == ["a"]
    assert "logprobs" not in chunk(Piece(index=0, text="a"))["choices"][0]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_without_logprobs_there_are_none(endpoint: Endpoint) -> None:
    body = responses.whole(HEADS[endpoint], [Piece(index=0, text="a", finish_reason="stop")], responses.usage(1, 1))
    assert "logprobs" not in body["choices"][0]
