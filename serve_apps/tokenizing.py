"""Texts to tokens and back, in vLLM's shapes, so that a client can count and look before it asks."""

from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from serve_apps.conversations import read_conversation
from serve_apps.fields import refuse_unsupported
from serve_apps.prompts import check_tokens

SUPPORTED = frozenset({"model", "prompt", "messages", "tools", "tokens", "add_special_tokens", "return_token_strs"}) | {
    *("add_generation_prompt", "chat_template_kwargs"),
}


def tokenize(request: BaseModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> dict[str, Any]:
    """Return the response to a `/tokenize` body, which holds a `prompt` or `messages`.

    Raises:
        Refusal: a field that is not supported, or a conversation that the model's template cannot carry.
    """
    refuse_unsupported(request, SUPPORTED)
    fields = vars(request)
    if "messages" in fields:
        ids = read_conversation(request, tokenizer).prompt_ids
    else:
        ids = list(tokenizer(fields["prompt"], add_special_tokens=fields["add_special_tokens"]).input_ids)
    strings = tokenizer.convert_ids_to_tokens(ids) if fields["return_token_strs"] else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": strings}


def detokenize(request: BaseModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Return the response to a `/detokenize` body, special tokens written out.

    Raises:
        Refusal: a token that the model does not have.
    """
    refuse_unsupported(request, SUPPORTED)
    ids = vars(request)["tokens"]
    check_tokens("tokens", ids, vocab_size)
    return {"prompt": str(tokenizer.decode(ids))}
