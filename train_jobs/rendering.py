"""What a model's chat template makes of dialogues, and which of it is trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from train_jobs.messages import Dialogue, Message, TrainOn
from train_jobs.records import DataError

if TYPE_CHECKING:  # see train_jobs.tokens
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One trained answer: the dialogue up to and with it, and where in it the trained tokens stand."""

    through: list[int]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendered:
    """A dialogue whose trained answers are rendered twice: their prompt, and the dialogue through them."""

    dialogue: Dialogue
    turns: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Prompt and dialogue through the answer, for each of `turns`."""
    problem: str | None = None


def trained_answers(
    dialogues: Sequence[Dialogue],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
) -> Iterator[list[Answer] | DataError]:
    """Yield the trained answers of each dialogue, or why it has none; all of their texts are encoded in one call.

    An answer is found by prefix rendering: it is what its turn adds to the prompt that serving would send.
    """
    rendered = [_rendered(dialogue, tokenizer, train_on) for dialogue in dialogues]
    encoded = iter(_encoded([text for one in rendered for text in one.texts], tokenizer))
    stops = {*stop_token_ids, tokenizer.eos_token_id} - {None}
    for one in rendered:
        where = one.dialogue.where
        if one.problem is not None:
            yield DataError(f"{where}: {one.problem}")
            continue
        # Both of a turn's texts are taken, whether or not the turn before it could be used.
        pairs = [(turn, next(encoded), next(encoded)) for turn in one.turns]
        try:
            yield [_answer(turn, prompt, through, stops) for turn, prompt, through in pairs]
        except ValueError as error:
            yield DataError(f"{where}: {error}")


def _rendered(dialogue: Dialogue, tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn) -> _Rendered:
    messages, tools = dialogue.as_dicts(), list(dialogue.tools)
    turns = _trained_turns(dialogue.messages, train_on)
    try:
        if tools and render(messages[:1], tokenizer, tools) == render(messages[:1], tokenizer):
            return _Rendered(dialogue=dialogue, problem="tools: this model's chat template has no place for them")
        texts = []
        for turn in turns:
            texts.append(render(messages[:turn], tokenizer, tools, add_generation_prompt=True))
            texts.append(render(messages[: turn + 1], tokenizer, tools))
    except (TemplateError, ValueError) as error:
        return _Rendered(dialogue=dialogue, problem=str(error).splitlines()[0])
    return _Rendered(dialogue=dialogue, turns=turns, texts=texts)


def render(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[dict[str, Any]] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of `messages` in the tokenizer's own template."""
    return str(
        tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    )


def _encoded(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the ids of rendered texts, in which the template has put all special tokens itself."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    ).input_ids
    return ids


def _answer(turn: int, prompt: list[int], through: list[int], stops: set[int]) -> Answer:
    if through[: len(prompt)] != prompt:
        raise ValueError(
            f"messages.{turn}: the chat template does not render this answer as a continuation of its prompt, so its "
            f"tokens cannot be told apart; does it begin with a blank?"
        )
    # The template may write a line break behind the end-of-turn token; the model never has to produce it.
    end = next((i + 1 for i in reversed(range(len(prompt), len(through))) if through[i] in stops), len(through))
    return Answer(through=through, begin=len(prompt), end=end)


def _trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight != 0]
    return answers if train_on == "all" else answers[-1:]
