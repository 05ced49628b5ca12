"""How a served model does on a file, through its endpoint: which of its greedy answers are right.

The endpoint does not tell the loss of a given text, so there is none.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import openai

from cluster.errors import UserError
from train_jobs.data import read_data_file
from train_jobs.job import Question
from train_jobs.messages import Dialogue
from train_jobs.questions import EXTRA_ANSWER_TOKENS, asked, last_answer
from train_jobs.records import DataError
from train_jobs.scored import Score, answered

NUM_STREAMS = 8
"""Requests in flight: a batch for the engine, and not all there are at once."""


class EndpointRefused(UserError, RuntimeError):
    """Nothing answers at the endpoint, or it refuses a question."""


def score_served(
    client: openai.OpenAI, model: str, *, source: str | Path, limit: int | None, on_answer: Callable[[int, int], None]
) -> Score:
    """Return how `model` at the endpoint of `client` answers the first `limit` examples of `source`.

    `on_answer` is told how many of how many questions are answered.

    Raises:
        DataError: The file cannot be read, or asks nothing.
        EndpointRefused: Nothing answers there, or a request was refused; the message is the server's.
    """
    file = read_data_file(source)
    examples = file.examples[:limit]
    dialogues = [d for d in examples if isinstance(d, Dialogue) and _reference(d)]
    if not dialogues:
        raise DataError(f"{source}: no dialogue ends in an answer, and an endpoint tells no loss; leave out --url.")
    questions: list[Question] = []
    answers: list[str] = []
    try:
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            for question, answer in pool.map(lambda dialogue: _ask(client, model, dialogue), dialogues):
                questions.append(question)
                answers.append(answer)
                on_answer(len(answers), len(dialogues))
    except openai.APIConnectionError as error:
        raise EndpointRefused(f"Nothing answers at {client.base_url}; start it with `kajiya up`.") from error
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise EndpointRefused(str(body.get("message") or error.message)) from error
    return Score(
        model=model,
        precision=None,
        data=file.name,
        data_sha256=file.sha256,
        num_samples=len(examples),
        loss=None,
        answers=answered(questions, answers),
    )


def _ask(client: openai.OpenAI, model: str, dialogue: Dialogue) -> tuple[Question, str]:
    reference = _reference(dialogue)
    question = Question(
        prompt_ids=(),  # the server has the tokenizer
        answer_contains=dialogue.answer_contains,
        max_new_tokens=_count_tokens(client, model, reference) + EXTRA_ANSWER_TOKENS,
        text=asked(dialogue),
        reference=reference,
    )
    messages = dialogue.as_dicts()[: last_answer(dialogue)]
    answer = client.chat.completions.create(
        model=model,
        messages=cast("Any", messages),
        tools=cast("Any", list(dialogue.tools) or openai.omit),
        max_tokens=question.max_new_tokens,
        temperature=0,
    )
    return question, answer.choices[0].message.content or ""


def _reference(dialogue: Dialogue) -> str:
    return dialogue.messages[last_answer(dialogue)].content.strip()


def _count_tokens(client: openai.OpenAI, model: str, text: str) -> int:
    """Ask `/tokenize`, which lies beside `/v1`."""
    url = str(client.base_url).rstrip("/").removesuffix("/v1") + "/tokenize"
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    found: dict[str, Any] = client.post(url, body=body, cast_to=dict[str, Any])
    return int(found["count"])
