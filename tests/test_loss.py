"""The loss with the head only where there are labels, against the model's own."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from train_jobs.loss import PackLoss, UnsupportedModelError

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4))


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_blocks_of_rows_have_the_models_own_loss(make: type) -> None:
    torch.manual_seed(0)
    model = make().eval()
    input_ids = torch.randint(1, 96, (4, 10))
    labels = input_ids.clone()
    labels[:, :3] = labels[1, 6:] = labels[2, 4:] = -100
    with torch.no_grad():
        sums = PackLoss(model)(input_ids, labels, 2)
        for block, rows in enumerate((slice(0, 2), slice(2, 4))):
            # padding behind the labels is attended to by nothing that has one
            mean = model(input_ids=input_ids[rows], labels=labels[rows]).loss
            count = (labels[rows, 1:] != -100).sum()
            assert sums[block].item() == pytest.approx((mean * count).item(), rel=1e-5)


def test_rows_without_labels_cost_nothing_and_give_zero_gradients() -> None:
    model = tiny_llama()
    input_ids = torch.ones(2, 5, dtype=torch.long)
    loss = PackLoss(model)(input_ids, torch.full_like(input_ids, -100), 2)
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert all(not p.grad.any() for p in model.model.layers.parameters() if p.grad is not None)


def test_models_that_scale_their_logits_are_refused() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, num_attention_heads=4, logits_scaling=8.0))
    with pytest.raises(UnsupportedModelError, match="GraniteForCausalLM changes its logits"):
        PackLoss(model)
