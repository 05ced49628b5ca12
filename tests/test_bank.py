"""The adapter bank against PEFT: same logits, same gradients, same training, same files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from banked import ATTENTION, FAMILIES, LLAMA_TARGETS, copy_of, filled, logits, some_ids, tiny_llama
from peft import PeftModel
from transformers import (
    PreTrainedModel,
)

from cluster.models.adapter_spec import AdapterSpec
from cluster.models.bank import AdapterBank


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("make", "targets"), FAMILIES)
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(
    make: Callable[[], PreTrainedModel], targets: tuple[str, ...], tmp_path: Path
) -> None:
    model, input_ids = make().eval(), some_ids(2, 9)
    peft_base = copy_of(model)
    spec = AdapterSpec(r=3, lora_alpha=7, target_modules=targets, use_rslora=True)
    bank = AdapterBank(model, num_slots=2, max_r=5, target_modules=targets)
    bank.init_slot(1, spec, seed=4)
    for layer in bank.layers.values():
        torch.nn.init.normal_(layer.lora_B.data[1, :3], std=0.3)
    bank.save_slot(1, tmp_path / "a", base_model_name_or_path="some/base", revision="abc")
    with bank.rows([1, 1]), torch.no_grad():
        ours = logits(model, input_ids)
    with torch.no_grad():
        base = logits(peft_base, input_ids)
        theirs = logits(PeftModel.from_pretrained(peft_base, str(tmp_path / "a")), input_ids)
    assert (ours - theirs).abs().max() <= 1e-4
    assert (theirs - base).abs().max() > 1e-2
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "abc")


@pytest.mark.parametrize(("make", "targets"), FAMILIES)
def test_one_adapter_trains_like_a_plain_peft_loop(
    make: Callable[[], PreTrainedModel], targets: tuple[str, ...], tmp_path: Path
) -> None:
    model = make()
    spec = AdapterSpec(r=4, lora_alpha=8, target_modules=targets)
    folder = filled(model, spec, tmp_path / "start", seed=3)
    peft = PeftModel.from_pretrained(copy_of(model), str(folder), is_trainable=True).train()
    bank = AdapterBank(model.train(), num_slots=1, max_r=4, target_modules=targets)
    bank.load_slot(0, folder)
    theirs = train(peft, [p for p in peft.parameters() if p.requires_grad])
    with bank.rows([0] * 3):
        ours = train(model, list(bank.parameters()))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert theirs[-1] < theirs[0] - 0.02
    grads = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(bank.parameters()))
    for name, layer in bank.layers.items():
        assert layer.lora_A.grad is not None
        assert layer.lora_B.grad is not None
        torch.testing.assert_close(layer.lora_A.grad[0], grads[f"base_model.model.{name}.lora_A.default.weight"])
        torch.testing.assert_close(layer.lora_B.grad[0].T, grads[f"base_model.model.{name}.lora_B.default.weight"])


def train(model: torch.nn.Module, parameters: list[torch.nn.Parameter], *, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(steps):
        input_ids = some_ids(3, 8, seed=step % 2)
        optimizer.zero_grad()
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("make", "targets"), FAMILIES)
def test_each_adapter_of_a_pack_trains_as_if_alone(
    make: Callable[[], PreTrainedModel], targets: tuple[str, ...]
) -> None:
    model = make()
    specs = [
        AdapterSpec(r=2, lora_alpha=8, target_modules=targets, lora_dropout=0.2),
        AdapterSpec(r=5, lora_alpha=4, target_modules=targets[:2], use_rslora=True),
        AdapterSpec(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.05),
    ]
    alone = [pack_losses(copy_of(model), [spec], targets, first=k)[0] for k, spec in enumerate(specs)]
    together = pack_losses(copy_of(model), specs, targets)
    for k in range(3):
        assert together[k] == pytest.approx(alone[k], abs=1e-5)
        assert abs(alone[k][4] - alone[k][0]) > 1e-3  # the same samples: training changed something


def pack_losses(
    model: PreTrainedModel, specs: list[AdapterSpec], targets: tuple[str, ...], *, first: int = 0
) -> list[list[float]]:
    """Train all `specs` at once, adapter k on data k of length 6 + k, and return each one's losses."""
    bank = AdapterBank(model.train(), num_slots=len(specs), max_r=max(s.r for s in specs), target_modules=targets)
    for k, spec in enumerate(specs):
        bank.init_slot(k, spec, seed=first + k)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2, weight_decay=0.1)
    width = 6 + first + len(specs) - 1
    losses: list[list[float]] = [[] for _ in specs]
    for step in range(6):
        input_ids = torch.zeros(2 * len(specs), width, dtype=torch.long)
        labels = torch.full_like(input_ids, -100)
        for k in range(len(specs)):
            length = 6 + first + k
            row = some_ids(2, length, seed=100 * (first + k) + step % 2)
            input_ids[2 * k : 2 * k + 2, :length] = labels[2 * k : 2 * k + 2, :length] = row
        keys = [1000 * (first + k) + 10 * step + row for k in range(len(specs)) for row in range(2)]
        with bank.rows([k for k in range(len(specs)) for _ in range(2)], dropout_keys=keys):
            scores = logits(model, input_ids)
            means = [
                torch.nn.functional.cross_entropy(scores[rows, :-1].flatten(0, 1), labels[rows, 1:].flatten())
                for rows in (slice(2 * k, 2 * k + 2) for k in range(len(specs)))
            ]
            optimizer.zero_grad()
            torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for k, mean in enumerate(means):
            losses[k].append(mean.item())
    for layer in bank.layers.values():
        for k, spec in enumerate(specs):
            assert not layer.lora_A.data[k, spec.r :].any()
            assert not layer.lora_B.data[k, spec.r :].any()
    return losses


def test_ranks_beyond_an_adapters_own_and_modules_it_does_not_target_stay_zero() -> None:
    model = tiny_llama()
    bank = AdapterBank(model.train(), num_slots=2, max_r=6, target_modules=LLAMA_TARGETS)
    bank.init_slot(0, AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj",)), seed=0)
    bank.init_slot(1, AdapterSpec(r=6, lora_alpha=4, target_modules=LLAMA_TARGETS), seed=0)
    with bank.rows([0, 1, 1][:2]):
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.5)
        for step in range(3):
            input_ids = some_ids(2, 8, seed=step)
            optimizer.zero_grad()
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            optimizer.step()
    for name, layer in bank.layers.items():
        used = 2 if name.endswith("q_proj") else 0
        assert not layer.lora_A.data[0, used:].any()
        assert not layer.lora_B.data[0, used:].any()
        assert layer.lora_B.data[1].all(dim=1).any()
        assert bool(layer.lora_B.data[0].any()) == (used > 0)


def test_rows_may_use_some_of_the_slots_in_any_order(tmp_path: Path) -> None:
    model, input_ids = tiny_llama().eval(), some_ids(4, 6)
    spec = AdapterSpec(r=3, lora_alpha=6, target_modules=ATTENTION)
    folders = [filled(model, spec, tmp_path / str(k), seed=k) for k in range(3)]
    bank = AdapterBank(model, num_slots=4, max_r=3, target_modules=ATTENTION)
    for k, folder in enumerate(folders):
        bank.load_slot(k, folder)
    with torch.no_grad():
        with bank.rows([2, 2, 0, 0]):
            mixed = logits(model, input_ids)
        with bank.rows([2, 2]):
            torch.testing.assert_close(mixed[:2], logits(model, input_ids[:2]))
        with bank.rows([0, 0]):
            torch.testing.assert_close(mixed[2:], logits(model, input_ids[2:]))
    assert (mixed[:2] - mixed[2:]).abs().max() > 1e-2


def test_rows_end_to_end_have_the_updates_and_the_dropout_of_rows_apart() -> None:
    model = tiny_llama().train()
    bank = AdapterBank(model, num_slots=2, max_r=4, target_modules=("q_proj",))
    for k, dropout in enumerate((0.0, 0.5)):
        spec = AdapterSpec(r=2 + 2 * k, lora_alpha=6, target_modules=("q_proj",), lora_dropout=dropout)
        bank.init_slot(k, spec, seed=k)
    layer = next(iter(bank.layers.values()))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 7, 32)
    with bank.rows([1, 1, 0], dropout_keys=[4, 5, 6]):
        apart = layer(x)
    with bank.rows([1, 1, 0], dropout_keys=[4, 5, 6], lengths=[7, 2, 5]):
        together = layer(torch.cat([x[0], x[1, :2], x[2, :5]])[None])[0]
        with pytest.raises(ValueError, match="1 x 15 tokens in the pass, 1 x 14 in its routing"):
            layer(x[:1].repeat(1, 3, 1)[:, :15])
    torch.testing.assert_close(together, torch.cat([apart[0], apart[1, :2], apart[2, :5]]))
    with pytest.raises(ValueError, match="3 rows need as many lengths, got 2"), bank.rows([0, 0, 0], lengths=[7, 2]):
        pass


def test_a_new_adapter_depends_on_its_seed_alone() -> None:
    spec = AdapterSpec(r=3, lora_alpha=6, target_modules=("v_proj", "q_proj"))
    small = AdapterBank(tiny_llama(), num_slots=1, max_r=3, target_modules=("q_proj", "v_proj"))
    large = AdapterBank(tiny_llama(), num_slots=5, max_r=9, target_modules=LLAMA_TARGETS)
    small.init_slot(0, spec, seed=11)
    large.init_slot(0, spec, seed=12)
    large.init_slot(4, spec, seed=11)
    for name, layer in small.layers.items():
        twin = large.layers[name].lora_A.data
        assert torch.equal(layer.lora_A.data[0], twin[4, :3])
        assert not torch.equal(twin[0, :3], twin[4, :3])
        assert not layer.lora_B.data.any()
        # Kaiming's bound with a = sqrt(5) is 1 / sqrt(d_in)
        assert layer.lora_A.data.abs().max() <= 32**-0.5
        assert layer.lora_A.data.abs().max() > 0.8 * 32**-0.5


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    model = tiny_llama().train()
    bank = AdapterBank(model, num_slots=2, max_r=1, target_modules=("q_proj",))
    bank.init_slot(0, AdapterSpec(r=1, lora_alpha=1, target_modules=("q_proj",), lora_dropout=0.25), seed=0)
    bank.init_slot(1, AdapterSpec(r=1, lora_alpha=1, target_modules=("q_proj",)), seed=0)
    layer = next(iter(bank.layers.values()))
    layer.base_layer.weight.data.zero_()  # type: ignore[operator]
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1.0)
    with bank.rows([0, 1], dropout_keys=[5, 6]):
        out = layer(torch.ones(2, 4000, 32))[..., 0]
        again = layer(torch.ones(2, 1000, 32))[..., 0]
    kept = out[0] * 0.75  # how many of the 32 inputs stayed
    # 128,000 draws: the standard error of the share is 0.0012
    assert kept.sum().item() / (4000 * 32) == pytest.approx(0.75, abs=0.006)
    assert kept.std().item() == pytest.approx((32 * 0.25 * 0.75) ** 0.5, rel=0.05)
    assert torch.equal(out[1], torch.full((4000,), 32.0))
    assert torch.equal(again[0], out[0, :1000])
    with pytest.raises(ValueError, match="need as many dropout_keys, got 0"), bank.rows([0, 1]):
        pass


def test_gradient_checkpointing_recomputes_the_same_dropout() -> None:
    gradients = []
    start = tiny_llama()
    for checkpointing in (False, True):
        model = copy_of(start).train()
        bank = AdapterBank(model, num_slots=1, max_r=2, target_modules=LLAMA_TARGETS)
        bank.init_slot(0, AdapterSpec(r=2, lora_alpha=4, target_modules=LLAMA_TARGETS, lora_dropout=0.3), seed=1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        input_ids = some_ids(2, 8)
        with bank.rows([0, 0], dropout_keys=[1, 2]):
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad for p in bank.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_only_adapters_learn_and_nothing_below_the_first_needs_gradients() -> None:
    model = tiny_llama()
    bank = AdapterBank(model, num_slots=1, max_r=2, target_modules=("down_proj",))
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in bank.parameters()}
    bank.init_slot(0, AdapterSpec(r=2, lora_alpha=4, target_modules=("down_proj",)), seed=0)
    seen: list[bool] = []
    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].requires_grad)
    )
    with bank.rows([0]):
        model(input_ids=some_ids(1, 4))
    assert seen == [False]
