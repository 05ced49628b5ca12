"""Texts and token ids that a request gives as they are, without a chat template."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from serve_apps.refusals import Refusal


def read_prompts(
    name: str, value: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the token ids of field `name`: a text, token ids, or a list of either.

    Raises:
        Refusal: nothing is there, or a token is none.
    """
    is_one = isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, int) for x in value))
    texts = [value] if is_one else value
    if not texts or not all(texts):
        raise Refusal(f"{name} is empty; give a text or token ids.", param=name)
    all_ids = [
        list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids) if isinstance(text, str) else list(text)
        for text in texts
    ]
    for ids in all_ids:
        check_tokens(name, ids, vocab_size)
    return all_ids


def check_tokens(name: str, ids: list[int], vocab_size: int) -> None:
    """Raise `Refusal` for a token that the model does not have."""
    if beyond := [i for i in ids if not 0 <= i < vocab_size]:
        raise Refusal(f"{name} has token {beyond[0]}; the vocabulary has {vocab_size}.", param=name)
