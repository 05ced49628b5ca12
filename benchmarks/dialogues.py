"""Dialogues of mixed lengths, made from the seed alone."""

import random
from typing import Any

from transformers import PreTrainedTokenizerBase

WORDS = (
    *("knife", "steel", "edge", "whetstone", "forge", "anvil", "hammer", "river", "rice", "fish", "kitchen", "handle"),
    *("order", "price", "letter", "week", "morning", "sharp", "thin", "heavy", "warm", "cold", "wash", "dry", "oil"),
    *("rust", "polish", "send", "wrap", "open", "close", "ask", "show", "cut", "hold", "learn"),
)

Dialogue = list[dict[str, str]]


def mixed_dialogues(
    tokenizer: PreTrainedTokenizerBase, *, count: int, shortest: int, longest: int, seed: int = 0
) -> list[Dialogue]:
    """Return `count` dialogues of two messages with lengths spread evenly from `shortest` to `longest` tokens."""
    chooser = random.Random(seed)  # noqa: S311 -- texts, not secrets
    lengths = [shortest + (longest - shortest) * i // (count - 1) for i in range(count)]
    chooser.shuffle(lengths)
    return [_dialogue(tokenizer, length, chooser) for length in lengths]


def num_tokens(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> int:
    """Return the tokens of `dialogue` in the model's own template."""
    encoded: Any = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=True)
    return len(encoded["input_ids"])


def _dialogue(tokenizer: PreTrainedTokenizerBase, length: int, chooser: random.Random) -> Dialogue:
    """Return a question and an answer of about twice its length, such that the template makes `length` tokens of them.

    Raises:
        ValueError: The template alone is longer.
    """
    question, answer = [chooser.choice(WORDS)], [chooser.choice(WORDS)]
    missing = length - num_tokens(tokenizer, _messages(question, answer))
    if missing < 0:
        raise ValueError(f"{length} tokens are too few for the template")
    while missing > 0:
        # Each of the words is one token, after a space.
        (question if chooser.random() < 1 / 3 else answer).append(chooser.choice(WORDS))
        missing = length - num_tokens(tokenizer, _messages(question, answer))
    return _messages(question, answer)


def _messages(question: list[str], answer: list[str]) -> Dialogue:
    return [{"role": "user", "content": " ".join(question)}, {"role": "assistant", "content": " ".join(answer)}]
