import json
from typing import Any

import pytest
from ray.serve.llm.openai_api_models import ChatCompletionRequest

from serve_apps.call import Call
from serve_apps.meter import Meter

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
TEXT = 'data: {"choices":[{"index":0,"delta":{"content":"a \\"usage\\": b"}}]}\n\n'
LAST = f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n"
DONE = "data: [DONE]\n\n"


def call() -> Call:
    return Call(request_id="1", method="POST", path="/", client="")


def body(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], **fields)


def test_every_stream_is_asked_for_its_usage_and_the_client_sees_it_only_when_wanted() -> None:
    silent, noted = body(stream=True), call()
    meter = Meter(noted, silent)
    assert silent.stream_options is not None
    assert silent.stream_options.include_usage
    assert meter.read(TEXT) == TEXT
    told = [noted.is_complete]
    assert meter.read(LAST + DONE) == DONE
    assert [*told, noted.is_complete] == [False, True]
    assert (noted.num_prompt_tokens, noted.num_completion_tokens) == (7, 3)

    wanting, noted = body(stream=True, stream_options={"include_usage": True}), call()
    meter = Meter(noted, wanting)
    assert meter.read([TEXT, LAST, DONE]) == TEXT + LAST + DONE
    assert (noted.num_prompt_tokens, noted.num_completion_tokens) == (7, 3)


def test_a_whole_answer_says_its_usage_itself() -> None:
    asked, noted = body(), call()
    meter = Meter(noted, asked)
    assert asked.stream_options is None
    answer = type("Answer", (), {"usage": type("Usage", (), USAGE)})
    assert meter.read(answer) is answer
    assert (noted.num_prompt_tokens, noted.num_completion_tokens) == (7, 3)


def test_the_first_token_is_timed_once() -> None:
    noted = call()
    meter = Meter(noted, body(stream=True))
    meter.read(TEXT)
    first = noted.first_token_s
    assert first is not None
    meter.read(TEXT)
    assert noted.first_token_s == pytest.approx(first, abs=0)
