"""FSDP with one worker, which holds the only part of everything: nothing may change. Two are in `test_strategy`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy_processes import forget
from test_pack import adapter, card, job_of, losses_of, pack_of
from torch.distributed.tensor import DTensor

from cluster.model_card import ModelCard
from train_jobs.fsdp import like, part, whole
from train_jobs.job import NO_ADAPTER, TrainJob
from train_jobs.state import read_state, write_state
from train_jobs.step import train_step

__all__ = ["card"]


@pytest.fixture(autouse=True)
def one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    forget()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    forget()


def lora(card: ModelCard) -> TrainJob:
    return job_of(card, replace(adapter(1, dropout=0.1), loraplus_lr_ratio=4.0), accumulation=2)


def full(card: ModelCard) -> TrainJob:
    return job_of(card, replace(adapter(1, lr=1e-3), spec=NO_ADAPTER), accumulation=2)


@pytest.mark.parametrize("is_checkpointing", [False, True])
@pytest.mark.parametrize("make", [lora, full])
def test_one_worker_trains_to_the_bit_as_without_fsdp(
    card: ModelCard, make: Callable[[ModelCard], TrainJob], is_checkpointing: bool
) -> None:
    job = replace(make(card), gradient_checkpointing=is_checkpointing)
    losses = losses_of(job)
    assert losses[-1][0] < losses[0][0] - 0.05
    assert losses_of(replace(job, strategy="fsdp")) == losses


def test_bf16_weights_go_on_with_the_digits_that_they_cannot_hold(card: ModelCard) -> None:
    job = replace(full(card), precision="bf16", compute_dtype="bfloat16", strategy="fsdp")
    undisturbed = [train_step(pack, {0: step}).losses for pack in [pack_of(job)] for step in range(8)]
    first = pack_of(job)
    for step in range(4):
        train_step(first, {0: step})
    second = pack_of(job)
    write_state(second, read_state(first))
    assert [train_step(second, {0: step}).losses for step in range(4, 8)] == undisturbed[4:]


def test_a_tensor_in_parts_comes_back_whole(card: ModelCard) -> None:
    pack = pack_of(replace(full(card), strategy="fsdp"))
    parameter = next(pack.loss.parameters())
    assert isinstance(parameter, DTensor)
    values = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    shared = like(parameter, values)
    assert torch.equal(whole(shared), values)
    part(shared).zero_()
    assert not whole(shared).any()
    plain = torch.ones(3)
    assert whole(plain) is part(plain) is plain
    assert like(plain, values) is not values
