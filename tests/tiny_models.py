"""A model folder small enough to train in milliseconds: random Llama, byte tokenizer, ChatML."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_START, IM_END = 0, 1


def byte_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|im_start|>": IM_START, "<|im_end|>": IM_END, **{char: i + 2 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    return fast


def tiny_llama_folder(folder: Path, *, seed: int = 0, **changes: int) -> Path:
    """Write the model into `folder` and return it; its layers are wide enough for blocks of 64 in 4 bit.

    `changes` are fields of its configuration.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": IM_END,
    }
    LlamaForCausalLM(LlamaConfig(**fields | changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def lively_tiny_folder(folder: Path, *, head_dim: int = 16) -> Path:
    """Write a random model that does not repeat one token for ever, as the usual start does."""
    tiny_llama_folder(folder, head_dim=head_dim)
    model = tiny_base(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def tiny_base(folder: Path) -> PreTrainedModel:
    """Load the model as transformers does."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model
