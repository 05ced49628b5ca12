"""The steps in C against torch's own."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from serve_apps.kernels import Kernels, Updates, kernels


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip("this machine has no C compiler")
    return found


@pytest.mark.parametrize("num_rows", [1, 16, 200])
def test_norm_and_activation_are_torchs(compiled: Kernels, num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 96) * 3, torch.randn(96)
    torch.testing.assert_close(compiled.rms_norm(x, weight, 1e-5), torch.rms_norm(x, (96,), weight, 1e-5))
    torch.testing.assert_close(compiled.silu_and_mul(x), silu(x[:, :48]) * x[:, 48:])


def test_extreme_activations_stay_numbers(compiled: Kernels) -> None:
    x = torch.tensor([[200.0, -200.0, 0.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(compiled.silu_and_mul(x), torch.tensor([[200.0, 0.0, 0.0]]))


@pytest.mark.parametrize("num_rows", [1, 70])
def test_a_turn_of_a_right_angle_swaps_the_halves(compiled: Kernels, num_rows: int) -> None:
    # 90 degrees: (a, b) becomes (-b, a); the last head is not turned
    heads = torch.arange(num_rows * 12, dtype=torch.float32).view(num_rows, 3, 4)
    before = heads.clone()
    sines = torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand(num_rows, 4).contiguous()
    compiled.turn(heads, torch.zeros(num_rows, 4), sines, num_turned=2)
    assert torch.equal(heads[:, :2, :2], -before[:, :2, 2:])
    assert torch.equal(heads[:, :2, 2:], before[:, :2, :2])
    assert torch.equal(heads[:, 2], before[:, 2])


@pytest.mark.parametrize("lengths", [[1], [5, 40, 17], [33] * 16])
def test_attention_reads_each_rows_own_places(compiled: Kernels, lengths: list[int]) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(700, 2, 8), torch.randn(700, 2, 8)
    wide = torch.randn(len(lengths), 10, 8)  # queries are part of wider rows
    query, longest = wide[:, :6], max(lengths)
    places = torch.randperm(700)[: len(lengths) * longest].view(-1, longest)
    scores = torch.empty(len(lengths), 6, longest)
    ours = compiled.attend(query, keys, values, places, torch.tensor(lengths), scores, 0.3)
    for row, length in enumerate(lengths):
        key, value = (x[places[row, :length]].transpose(0, 1).repeat_interleave(3, dim=0) for x in (keys, values))
        theirs = scaled_dot_product_attention(query[row][:, None], key, value, scale=0.3)[:, 0]
        torch.testing.assert_close(ours[row], theirs)


@pytest.mark.parametrize(
    "slots",
    [
        [0, 1, -1, 1],  # neighbours without anything in common, and one without an adapter
        [0] * 11 + [1] * 3 + [2] * 2,  # four, two and one at a time
    ],
)
def test_each_row_gets_the_updates_of_its_own_adapter(compiled: Kernels, slots: list[int]) -> None:
    torch.manual_seed(0)
    ranks, scales = [19, 1, 8], [0.5, 2.0, 1.5]  # more, fewer and as many as the kernel takes at a time
    x, wide = torch.randn(len(slots), 37), torch.randn(len(slots), 50)
    weights = {place: (torch.randn(3, 20, 37), torch.randn(3, 20, width)) for place, width in ((2, 6), (20, 19))}
    expected = wide.clone()
    for row, slot in enumerate(slots):
        for place, (lora_a, lora_b) in weights.items():
            if slot >= 0:
                update = x[row] @ lora_a[slot, : ranks[slot]].T @ lora_b[slot, : ranks[slot]]
                expected[row, place : place + lora_b.shape[2]] += scales[slot] * update
    untouched = [*range(2), *range(8, 20), *range(39, 50)]
    before = wide[:, untouched].clone()
    rank_of_row = torch.tensor([ranks[slot] if slot >= 0 else 0 for slot in slots])
    scale_of_row = torch.tensor([scales[slot] for slot in slots])
    compiled.add_updates(x, Updates(weights), torch.tensor(slots), rank_of_row, scale_of_row, wide)
    torch.testing.assert_close(wide, expected)
    assert torch.equal(wide[:, untouched], before)


def test_without_a_working_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert kernels.__wrapped__() is None
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    assert kernels.__wrapped__() is None
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_library_is_compiled_once(compiled: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_again(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    kernels.__wrapped__()  # the fixture's may lie in the home of a test before this one
    monkeypatch.setattr(subprocess, "run", compile_again)
    assert kernels.__wrapped__() is not None
