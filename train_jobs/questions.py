"""What a model is asked of the held-out part: each dialogue up to its last answer."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from train_jobs.job import Question
from train_jobs.messages import Dialogue, Document
from train_jobs.tokens import prompt_ids

EXTRA_ANSWER_TOKENS = 8
"""How much longer than the reference an answer may be."""
NUM_SHOWN = 8
"""Questions of a training run whose answers are shown before and after, where the data has none to be checked."""
MAX_SHOWN_TOKENS = 128
"""Longest reference among those: answers are generated token by token, while the workers wait."""


def question_of(example: Dialogue | Document, tokenizer: PreTrainedTokenizerBase) -> Question | None:
    """Return what to ask; None for a text, and for a dialogue whose last answer only calls tools."""
    if isinstance(example, Document):
        return None
    messages = example.as_dicts()
    last = last_answer(example)
    reference = str(messages[last]["content"]).strip()
    if not reference and example.answer_contains is None:
        return None
    return Question(
        prompt_ids=tuple(prompt_ids(messages[:last], tokenizer, example.tools)),
        answer_contains=example.answer_contains,
        max_new_tokens=len(tokenizer(reference, add_special_tokens=False).input_ids) + EXTRA_ANSWER_TOKENS,
        text=asked(example),
        reference=reference,
    )


def last_answer(dialogue: Dialogue) -> int:
    """Return which message is the dialogue's last answer."""
    return max(i for i, message in enumerate(dialogue.messages) if message.role == "assistant")


def asked(dialogue: Dialogue) -> str:
    """Return the user's last words before the last answer, for people to read."""
    before = dialogue.messages[: last_answer(dialogue)]
    return next((message.content for message in reversed(before) if message.role == "user"), "")


def all_questions(examples: Iterable[Dialogue | Document], tokenizer: PreTrainedTokenizerBase) -> tuple[Question, ...]:
    """Return every question there is."""
    found = (question_of(example, tokenizer) for example in examples)
    return tuple(question for question in found if question is not None)


def run_questions(examples: Sequence[Dialogue | Document], tokenizer: PreTrainedTokenizerBase) -> tuple[Question, ...]:
    """Return what a training run asks before and after: all that says what an answer must contain.

    Where nothing does, the first few short ones are asked and compared with the whole reference.
    """
    checkable = [e for e in examples if isinstance(e, Dialogue) and e.answer_contains is not None]
    if checkable:
        return all_questions(checkable, tokenizer)
    shown: list[Question] = []
    for example in examples:
        question = question_of(example, tokenizer)
        if question is not None and question.max_new_tokens <= MAX_SHOWN_TOKENS + EXTRA_ANSWER_TOKENS:
            shown.append(question)
        if len(shown) == NUM_SHOWN:
            break
    return tuple(shown)
