"""Examples as token ids, with the tokens that are trained marked: dialogues through the model's own chat template."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from train_jobs.messages import Dialogue, Document, Message, TrainOn
from train_jobs.records import DataError

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

    def first(self, max_length: int) -> "Sample":
        """Return the sample's first `max_length` tokens."""
        return Sample(input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])


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
    examples: Iterable[Dialogue | Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
) -> TokenizedData:
    """Return the samples of `examples`.

    Of a dialogue the assistant's turns are trained, up to and with their end-of-turn token; one of more than
    `max_length` tokens keeps its first `max_length`. A text is trained whole, in pieces of `max_length`.

    Raises:
        DataError: The template refuses a dialogue, its answers cannot be told from their prompts, or nothing
            trainable is left of a sample.
    """
    samples: list[Sample] = []
    num_cut = 0
    for example in examples:
        if isinstance(example, Document):
            samples += text_samples(example, tokenizer, max_length=max_length)
            continue
        for sample in dialogue_samples(example, tokenizer, stop_token_ids=stop_token_ids, train_on=train_on):
            if not (cut := sample.first(max_length)).num_trained_tokens:
                raise DataError(
                    f"{example.where}: nothing to train on is left within max_length={max_length} tokens; "
                    f"raise it with --max-length, or shorten the dialogue."
                )
            num_cut += len(sample.input_ids) > max_length
            samples.append(cut)
    return TokenizedData(samples=tuple(samples), num_cut=num_cut)


def text_samples(document: Document, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Iterator[Sample]:
    """Yield `document` in pieces of at most `max_length` tokens, its end marked as the tokenizer marks it.

    Raises:
        DataError: It is a single token, which nothing before it predicts.
    """
    ids: list[int] = tokenizer(document.text).input_ids
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise DataError(f"{document.where}: a single token has nothing before it to learn from; give more text.")
    for start in range(0, len(ids), max_length):
        piece = tuple(ids[start : start + max_length])
        if len(piece) > 1:  # a last token alone predicts nothing
            yield Sample(input_ids=piece, labels=piece)


def prompt_ids(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Return the ids of `messages` with the opening of the assistant's turn, as serving renders them."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tools=list(tools) or None, add_generation_prompt=True, return_dict=False
    )
    return ids


def dialogue_samples(
    dialogue: Dialogue,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
) -> list[Sample]:
    """Return `dialogue` as one sample, of whatever length.

    A template that rewrites earlier turns (those of reasoning models drop earlier thoughts) gives one sample for each
    trained answer, so that every answer is trained behind the very prompt that serving would send.

    Raises:
        DataError: The template refuses it, or its answers cannot be told from their prompts.
    """
    messages, tools = dialogue.as_dicts(), list(dialogue.tools)
    stops = {*stop_token_ids, tokenizer.eos_token_id} - {None}
    trained = _trained_turns(dialogue.messages, train_on)
    try:
        if tools and _render(messages[:1], tokenizer, tools) == _render(messages[:1], tokenizer, []):
            raise ValueError("tools: this model's chat template has no place for them")
        turns = [_turn(messages, turn, tokenizer, tools, stops) for turn in trained]
    except (TemplateError, ValueError) as error:
        raise DataError(f"{dialogue.where}: {str(error).splitlines()[0]}") from None
    whole = turns[-1].through
    if any(whole[: len(turn.through)] != turn.through for turn in turns):
        return [_sample(turn.through, [turn]) for turn in turns]
    return [_sample(whole, turns)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """One trained answer: the dialogue up to and with it, and where in it the trained tokens stand."""

    through: list[int]
    begin: int
    end: int


def _turn(
    messages: list[dict[str, Any]],
    turn: int,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]],
    stops: set[int],
) -> _Turn:
    """Return answer `turn` by prefix rendering: it is what its turn adds to the prompt that serving would send."""
    prompt = prompt_ids(messages[:turn], tokenizer, tools)
    through = _render(messages[: turn + 1], tokenizer, tools)
    if through[: len(prompt)] != prompt:
        raise ValueError(
            f"messages.{turn}: the chat template does not render this answer as a continuation of its prompt, so its "
            f"tokens cannot be told apart; does it begin with a blank?"
        )
    # The template may write a line break behind the end-of-turn token; the model never has to produce it.
    ends = [i for i in range(len(prompt), len(through)) if through[i] in stops]
    return _Turn(through=through, begin=len(prompt), end=ends[-1] + 1 if ends else len(through))


def _render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]]
) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tools=tools or None, return_dict=False)
    return ids


def _trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight != 0]
    return answers if train_on == "all" else answers[-1:]


def _sample(input_ids: list[int], turns: Sequence[_Turn]) -> Sample:
    labels = [IGNORED] * len(input_ids)
    for turn in turns:
        labels[turn.begin : turn.end] = input_ids[turn.begin : turn.end]
    return Sample(input_ids=tuple(input_ids), labels=tuple(labels))
