"""The packed optimizer against torch's own, adapter by adapter."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from train_jobs.packed_adamw import PackedAdamW, clip_by_adapter

RATES, DECAYS = [1e-2, 3e-4, 0.1], [0.0, 0.1, 0.5]


def gradients(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 10.0 ** -(step % 3)


SHAPES = [(3, 4, 5), (3, 2, 7)]


class Twins:
    """Packed parameters under `PackedAdamW`, and each adapter's own copy under torch's AdamW."""

    def __init__(self) -> None:
        self.packed = [nn.Parameter(gradients(50 + i, shape)) for i, shape in enumerate(SHAPES)]
        self.alone = [[nn.Parameter(p.detach()[k].clone()) for p in self.packed] for k in range(3)]
        self.ours = PackedAdamW(self.packed, num_slots=3)
        self.ours.param_groups[0] |= {"lr": list(RATES), "weight_decay": list(DECAYS)}
        self.theirs = [self.fresh(k) for k in range(3)]
        self.done = [0, 0, 0]

    def fresh(self, k: int) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.alone[k], lr=RATES[k], weight_decay=DECAYS[k])

    def step(
        self, step: int, active: tuple[int, ...] = (0, 1, 2), max_norms: tuple[float, ...] = (math.inf,) * 3
    ) -> None:
        self.done = [done + (k in active) for k, done in enumerate(self.done)]
        self.ours.param_groups[0] |= {"active": [k in active for k in range(3)], "num_steps": self.done}
        for i, parameter in enumerate(self.packed):
            parameter.grad = torch.zeros(SHAPES[i])
            for k in active:
                parameter.grad[k] = gradients(step + 100 * i + 1000 * k, SHAPES[i][1:])
                self.alone[k][i].grad = parameter.grad[k].clone()
        ours = clip_by_adapter(self.ours.param_groups, max_norms, active)
        theirs = [float(nn.utils.clip_grad_norm_(self.alone[k], max_norms[k])) for k in active]
        assert ours == pytest.approx(theirs)
        self.ours.step()
        for k in active:
            self.theirs[k].step()

    def check(self) -> None:
        for k in range(3):
            for parameter, other in zip(self.packed, self.alone[k], strict=True):
                torch.testing.assert_close(parameter.detach()[k], other.detach(), rtol=1e-5, atol=1e-6)


def test_each_adapter_moves_as_under_torchs_adamw() -> None:
    twins = Twins()
    for step in range(20):
        twins.step(step)
    twins.check()


def test_a_resting_adapter_stays_and_a_new_one_in_its_place_starts_anew() -> None:
    twins = Twins()
    for step in range(6):
        twins.step(step)
    before = [p.detach()[1].clone() for p in twins.packed]
    for step in range(6, 9):
        twins.step(step, active=(0, 2))
    assert all(torch.equal(p.detach()[1], old) for p, old in zip(twins.packed, before, strict=True))
    twins.ours.reset_slot(1)
    twins.theirs[1] = twins.fresh(1)
    twins.done[1] = 0
    for step in range(9, 14):
        twins.step(step)
    twins.check()


def test_one_adapter_may_have_any_shape() -> None:
    flat, twin = (nn.Parameter(gradients(0, (13,))) for _ in range(2))
    ours, theirs = PackedAdamW([flat], num_slots=1), torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)
    ours.param_groups[0] |= {"lr": [0.01], "weight_decay": [0.1]}
    for step in range(5):
        flat.grad, twin.grad = gradients(step, (13,)), gradients(step, (13,))
        ours.param_groups[0]["num_steps"] = [step + 1]
        ours.step()
        theirs.step()
    torch.testing.assert_close(flat, twin)


def test_a_restored_optimizer_goes_on_to_the_bit() -> None:
    def run(optimizer: PackedAdamW, parameter: nn.Parameter, steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0] |= {"lr": [0.1, 0.2], "num_steps": [step + 1] * 2}
            parameter.grad = gradients(step, (2, 6))
            optimizer.step()

    whole, broken = (nn.Parameter(gradients(9, (2, 6))) for _ in range(2))
    run(PackedAdamW([whole], num_slots=2), whole, range(8))
    first = PackedAdamW([broken], num_slots=2)
    run(first, broken, range(3))
    second = PackedAdamW([broken], num_slots=2)
    second.load_state_dict(first.state_dict())
    run(second, broken, range(3, 8))
    assert torch.equal(whole, broken)


def test_clipping_looks_at_one_adapter_at_a_time() -> None:
    twins, plain = Twins(), Twins()
    for step in range(6):  # with gradients a tenth and a hundredth of these in turn: some are within a bound of 1
        twins.step(step, max_norms=(1.0, 100.0, 0.01))
        plain.step(step)
    twins.check()
    assert [torch.allclose(a, b) for a, b in zip(twins.packed[0], plain.packed[0], strict=True)] == [False, True, False]


def test_an_adapter_that_rests_goes_on_as_if_nobody_had_worked_meanwhile() -> None:
    rested, twin = (nn.Parameter(gradients(9, (2, 6))) for _ in range(2))
    ours, theirs = PackedAdamW([rested], num_slots=2), PackedAdamW([twin], num_slots=2)
    for optimizer, parameter, rests in ((ours, rested, {2, 3}), (theirs, twin, set())):
        step_of_first = 0
        for step in range(8 if rests else 6):
            parameter.grad = gradients(step, (2, 6))
            parameter.grad[0] = 0.0 if step in rests else gradients(100 + step_of_first, (6,))
            step_of_first += step not in rests
            optimizer.param_groups[0] |= {"lr": [0.1, 0.2], "active": [step not in rests, True]}
            optimizer.param_groups[0]["num_steps"] = [step_of_first, step + 1]
            optimizer.step()
    assert torch.equal(rested[0], twin[0])


def test_gradients_in_16_bit_become_float32_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    together = []
    fused = torch._fused_adamw_

    def record(exact: list[torch.Tensor], *arguments: Any, **named: Any) -> None:
        together.append([tuple(tensor.shape) for tensor in exact])
        fused(exact, *arguments, **named)

    monkeypatch.setattr(torch, "_fused_adamw_", record)
    half = [nn.Parameter(gradients(i, (1, 4 + i)).bfloat16()) for i in range(2)]
    exact = [nn.Parameter(gradients(i, (1, 7 + i))) for i in range(2)]
    for parameter in (*half, *exact):
        parameter.grad = torch.ones_like(parameter)
    PackedAdamW([half[0], exact[0], half[1], exact[1]], num_slots=1).step()
    assert together == [[(1, 4)], [(1, 5)], [(1, 7), (1, 8)]]
