"""A model that takes no time, so that what is around it can be measured."""

from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cluster.models.embedded import embedded_folder


def write_random_model(folder: Path) -> Path:
    """Write a random Llama of two narrow layers with SmolLM2's tokenizer and chat template, and return `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
