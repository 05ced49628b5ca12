"""Dialogues as token ids through the model's own chat template, with the tokens that are trained marked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from train_jobs.data import DataError, Dialogue

IGNORED = -100
"""The label of a token that is not trained, as `cross_entropy` takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One dialogue as the model sees it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The id itself where the token is trained, else `IGNORED`; not yet shifted."""

    @property
    def num_trained_tokens(self) -> int:
        """Return how many positions contribute to the loss; the first token has nothing before it that predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedData:
    """All samples of a file, and how many had to be cut."""

    samples: tuple[Sample, ...]
    num_cut: int
    """Samples longer than the limit; they keep their beginning."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all samples."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def num_trained_tokens(self) -> int:
        """Return the tokens of all samples that contribute to the loss."""
        return sum(sample.num_trained_tokens for sample in self.samples)


def tokenize(
    dialogues: Iterable[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: Path,
    max_length: int,
    stop_token_ids: Sequence[int] = (),
) -> TokenizedData:
    """Return the samples of `dialogues`; every assistant turn is trained, up to and with its end-of-turn token.

    A sample of more than `max_length` tokens keeps its first `max_length`.

    Raises:
        DataError: The template refuses a dialogue, its answers cannot be told from their prompts, or nothing
            trainable is left of a sample.
    """
    stops = {*stop_token_ids, tokenizer.eos_token_id} - {None}
    samples, num_cut = [], 0
    for dialogue in dialogues:
        sample = _tokenize_one(dialogue, tokenizer, stops, f"{path}:{dialogue.line}")
        if len(sample.input_ids) > max_length:
            num_cut += 1
            sample = Sample(input_ids=sample.input_ids[:max_length], labels=sample.labels[:max_length])
        if not sample.num_trained_tokens:
            raise DataError(
                f"{path}:{dialogue.line}: nothing to train on is left within max_length={max_length} tokens; "
                f"raise it with --max-length, or shorten the dialogue."
            )
        samples.append(sample)
    return TokenizedData(samples=tuple(samples), num_cut=num_cut)


def prompt_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `messages` with the opening of the assistant's turn, as serving renders them."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def _tokenize_one(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, stops: set[int], where: str) -> Sample:
    messages = dialogue.as_dicts()

    def render(count: int, *, opening: bool = False) -> list[int]:
        if opening:
            return prompt_ids(messages[:count], tokenizer)
        ids: list[int] = tokenizer.apply_chat_template(messages[:count], return_dict=False)
        return ids

    try:
        # What follows the last answer has no part in the training.
        end = max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1
        input_ids = render(end)
        labels = _labels(input_ids, messages[:end], render, stops)
    except (TemplateError, ValueError) as error:
        raise DataError(f"{where}: {str(error).splitlines()[0]}") from None
    return Sample(input_ids=tuple(input_ids), labels=tuple(labels))


def _labels(
    input_ids: list[int], messages: list[dict[str, str]], render: Callable[..., list[int]], stops: set[int]
) -> list[int]:
    """Return the labels by prefix rendering: an answer is what its turn adds to the prompt that serving would send."""
    labels = [IGNORED] * len(input_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, through = render(turn, opening=True), render(turn + 1)
        if through[: len(prompt)] != prompt or input_ids[: len(through)] != through:
            raise ValueError(
                f"messages.{turn}: the chat template does not render this answer as a continuation of its prompt, so "
                f"its tokens cannot be told apart; does it begin with a blank, or is text before it rewritten?"
            )
        # The template may write a line break behind the end-of-turn token; the model never has to produce it.
        ends = [i for i in range(len(prompt), len(through)) if input_ids[i] in stops]
        last = ends[-1] + 1 if ends else len(through)
        labels[len(prompt) : last] = input_ids[len(prompt) : last]
    return labels
