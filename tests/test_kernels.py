"""The steps in C against torch's own."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from serve_apps.kernels import Kernels, kernels


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


def test_each_row_gets_the_update_of_its_own_ranks(compiled: Kernels) -> None:
    torch.manual_seed(0)
    x, lora_a, lora_b = torch.randn(4, 12), torch.randn(5, 12), torch.randn(5, 6)
    wide = torch.randn(4, 9)
    before, ranks = wide.clone(), [(0, 2), (2, 3), (0, 0), (2, 3)]
    firsts, counts = (torch.tensor(column) for column in zip(*ranks, strict=True))
    compiled.add_updates(x, lora_a, lora_b, firsts, counts, wide[:, 2:8])
    for row, (first, count) in enumerate(ranks):
        mine = slice(first, first + count)
        torch.testing.assert_close(wide[row, 2:8], before[row, 2:8] + x[row] @ lora_a[mine].T @ lora_b[mine])
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, 8:], before[:, 8:])


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
