"""The loss with the head only where there are labels, against the model's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from train_jobs.batches import collate
from train_jobs.loss import PackLoss, UnsupportedModelError
from train_jobs.tokens import Sample

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4))


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))


def tiny_qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2))


def tiny_windowed_qwen2() -> PreTrainedModel:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **sliding, num_attention_heads=4, num_key_value_heads=2))


def tiny_stablelm() -> PreTrainedModel:
    return StableLmForCausalLM(StableLmConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4))


def tiny_phimoe() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, **experts, num_attention_heads=4, num_key_value_heads=2))


ALL = [tiny_llama, tiny_gpt2, tiny_qwen2, tiny_windowed_qwen2, tiny_stablelm, tiny_phimoe]


def sample(length: int, *, first_label: int, seed: int) -> Sample:
    ids = tuple(torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist())
    return Sample(input_ids=ids, labels=(-100,) * first_label + ids[first_label:])


def losses_of(loss: PackLoss, blocks: list[list[Sample]], opening: tuple[int, ...] = ()) -> torch.Tensor:
    batch = collate(blocks, device=torch.device("cpu"), opening=opening)
    with loss.attention.samples(batch.lengths, batch.parents):
        result: torch.Tensor = loss(batch)
        return result


@pytest.mark.parametrize("make", ALL)
def test_samples_end_to_end_have_the_models_own_loss_and_gradients_one_by_one(
    make: Callable[[], PreTrainedModel],
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at the usual start attention is nearly uniform and would hide a mistake
            if parameter.dim() > 1:
                parameter.mul_(5)
    twin = copy.deepcopy(model)
    blocks = [
        [sample(9, first_label=3, seed=1), sample(4, first_label=0, seed=2)],
        [sample(12, first_label=5, seed=3), sample(1, first_label=0, seed=4), sample(6, first_label=2, seed=5)],
    ]
    sums = losses_of(PackLoss(model), blocks)
    expected = torch.zeros(2)
    for k, block in enumerate(blocks):
        for one in block:
            logits = twin(input_ids=torch.tensor([one.input_ids])).logits[0, :-1]
            expected[k] += cross_entropy(logits, torch.tensor(one.labels[1:], dtype=torch.long), reduction="sum")
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    (sums * torch.tensor([1.0, 0.5])).sum().backward()  # type: ignore[no-untyped-call]
    (expected * torch.tensor([1.0, 0.5])).sum().backward()  # type: ignore[no-untyped-call]
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("make", ALL)
def test_outside_of_samples_the_model_is_what_it_was(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    input_ids, mask = torch.randint(1, 96, (2, 9)), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        before = model(input_ids=input_ids, attention_mask=mask).logits[mask.bool()]
        PackLoss(model)
        torch.testing.assert_close(model(input_ids=input_ids, attention_mask=mask).logits[mask.bool()], before)


def test_rows_without_labels_cost_nothing_and_give_zero_gradients() -> None:
    loss = PackLoss(tiny_llama())
    sums = losses_of(loss, [[sample(5, first_label=5, seed=1)], [sample(3, first_label=3, seed=1)]])
    assert sums.tolist() == [0, 0]
    sums.sum().backward()  # type: ignore[no-untyped-call]
    assert all(not p.grad.any() for p in loss.model.model.layers.parameters() if p.grad is not None)


def test_models_that_scale_their_logits_are_refused() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, num_attention_heads=4, logits_scaling=8.0))
    with pytest.raises(UnsupportedModelError, match="GraniteForCausalLM changes its logits"):
        PackLoss(model).check_head()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_stablelm])
def test_an_opening_that_is_computed_once_changes_neither_losses_nor_gradients(
    make: Callable[[], PreTrainedModel],
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    twin = copy.deepcopy(model)
    opening = sample(8, first_label=8, seed=9).input_ids
    blocks = [
        [
            Sample(input_ids=opening + s.input_ids, labels=(-100,) * 8 + s.labels)
            for s in (sample(length, first_label=2, seed=length) for length in lengths)
        ]
        for lengths in ((5, 9, 3), (4,))
    ]
    once, apart = losses_of(PackLoss(model), blocks, opening), losses_of(PackLoss(twin), blocks)
    torch.testing.assert_close(once, apart, rtol=1e-5, atol=1e-5)
    for losses in (once, apart):
        losses.sum().backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
