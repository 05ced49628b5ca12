"""Examples as token ids, with the tokens that are trained marked: dialogues through the model's own chat template."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from train_jobs.messages import Dialogue, Document, TrainOn
from train_jobs.records import DataError
from train_jobs.rendering import Answer, trained_answers

if TYPE_CHECKING:  # processes of trials get jobs with their samples, and do without transformers
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained, as `cross_entropy` takes it."""
BATCH_EXAMPLES = 256
"""Examples that are encoded in one call: the tokenizer's own batches are a few times faster than single texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One dialogue as the model sees it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The id itself where the token is trained, else `IGNORED`; not yet shifted."""

    @property
    def num_trained_tokens(self) -> int:
        """Return how many positions contribute to the loss; the first token has nothing before it that predicts it."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED) if self.labels else 0

    def first(self, max_length: int) -> "Sample":
        """Return the sample's first `max_length` tokens."""
        return Sample(input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])


def cut(sample: Sample, where: str, *, max_length: int) -> Sample:
    """Return the first `max_length` tokens of a sample of the example at `where`; raises `DataError` if none trains."""
    shortened = sample if len(sample.input_ids) <= max_length else sample.first(max_length)
    if not shortened.num_trained_tokens:
        raise DataError(
            f"{where}: nothing to train on is left within max_length={max_length} tokens; "
            f"raise it with --max-length, or shorten the dialogue."
        )
    return shortened


def whole_samples(
    examples: Iterable[Dialogue | Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
) -> Iterator[tuple[Dialogue | Document, list[Sample] | DataError]]:
    """Yield each example and its samples, or why it has none: texts in pieces, dialogues of whatever length.

    A template that rewrites earlier turns (those of reasoning models drop earlier thoughts) gives one sample for each
    trained answer, so that every answer is trained behind the very prompt that serving would send.
    """
    examples = iter(examples)
    while batch := list(islice(examples, BATCH_EXAMPLES)):
        dialogues = [example for example in batch if isinstance(example, Dialogue)]
        answers = trained_answers(dialogues, tokenizer, stop_token_ids=stop_token_ids, train_on=train_on)
        for example in batch:
            if isinstance(example, Document):
                yield example, _text_samples(example, tokenizer, max_length=max_length)
            else:
                found = next(answers)
                yield example, found if isinstance(found, DataError) else _dialogue_samples(found)


def cut_samples(
    examples: Iterable[Dialogue | Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
) -> Iterator[tuple[list[Sample], int]]:
    """Yield the samples of each example within `max_length` tokens, and how many were longer.

    Raises:
        DataError: The template refuses a dialogue, its answers cannot be told from their prompts, or nothing trainable
            is left of a sample.
    """
    for example, found in whole_samples(
        examples, tokenizer, max_length=max_length, stop_token_ids=stop_token_ids, train_on=train_on
    ):
        if isinstance(found, DataError):
            raise found
        num_cut = sum(len(sample.input_ids) > max_length for sample in found)
        yield [cut(sample, example.where, max_length=max_length) for sample in found], num_cut


def _text_samples(
    document: Document, tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> list[Sample] | DataError:
    """Return `document` in pieces of at most `max_length` tokens, its end marked as the tokenizer marks it."""
    ids: list[int] = tokenizer(document.text).input_ids
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        return DataError(f"{document.where}: a single token has nothing before it to learn from; give more text.")
    pieces = [tuple(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]
    # A last token alone predicts nothing.
    return [Sample(input_ids=piece, labels=piece) for piece in pieces if len(piece) > 1]


def prompt_ids(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Return the ids of `messages` with the opening of the assistant's turn, as serving renders them."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tools=list(tools) or None, add_generation_prompt=True, return_dict=False
    )
    return ids


def _dialogue_samples(answers: Sequence[Answer]) -> list[Sample]:
    whole = answers[-1].through
    if any(whole[: len(answer.through)] != answer.through for answer in answers):
        return [_sample(answer.through, [answer]) for answer in answers]
    return [_sample(whole, answers)]


def _sample(input_ids: list[int], answers: Sequence[Answer]) -> Sample:
    labels = [IGNORED] * len(input_ids)
    for answer in answers:
        labels[answer.begin : answer.end] = input_ids[answer.begin : answer.end]
    return Sample(input_ids=tuple(input_ids), labels=tuple(labels))
