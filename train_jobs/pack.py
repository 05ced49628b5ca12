"""Adapters that train together on one base."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from cluster.models.bank import AdapterBank
from cluster.models.lean_layers import make_lean
from cluster.models.whole_model import WholeModel
from train_jobs.batches import DataOrder, MicroBatch, opening_of
from train_jobs.job import NO_ADAPTER, AdapterJob, TrainJob
from train_jobs.loss import PackLoss
from train_jobs.packed_adamw import PackedAdamW
from train_jobs.schedule import lr_schedule
from train_jobs.strategy import prepare
from train_jobs.token_store import lengths_of, trained_counts_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One adapter's training. What it does at a step follows from that step alone, not from its neighbours."""

    job: AdapterJob
    order: DataOrder
    trained_counts: npt.NDArray[np.int32]
    """Tokens with a loss of each sample."""
    schedule: Callable[[int], float]
    """From the step, counting from 0, to the factor on the learning rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """What a worker holds for training: one base, and a slot for each adapter that trains on it."""

    job: TrainJob
    accelerator: Accelerator
    model: PreTrainedModel
    bank: AdapterBank | WholeModel
    """What is trained, by slot: adapters, or the model itself."""
    loss: PackLoss
    """Around the model."""
    module: nn.Module
    """`loss`, prepared for several workers."""
    adamw: PackedAdamW
    optimizer: torch.optim.Optimizer
    """`adamw`, prepared."""
    complete_gradients: Callable[[], None]
    """To call before a step of `optimizer`."""
    runs: dict[int, Run]
    """By slot; adapters come and go."""
    opening: tuple[int, ...]
    """How samples begin: computed once for all samples of an adapter in a pass."""

    @property
    def adapters(self) -> AdapterBank:
        """Return the bank of a pack of adapters; full fine-tuning has none."""
        assert isinstance(self.bank, AdapterBank), "a pack of adapters"
        return self.bank

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the longest run in the pack."""
        return max(run.job.num_steps for run in self.runs.values())

    def with_batches_of(self, job: TrainJob) -> "Pack":
        """Return this pack for runs whose batches are those of `job`; base, slots and runs are shared."""
        return replace(self, job=job)

    def take_turn(self) -> None:
        """Let the accelerator count this pack's micro batches; needed before a step where packs take turns."""
        self.accelerator.gradient_accumulation_steps = self.job.gradient_accumulation_steps
        self.accelerator.step = 0

    def enter(self, slot: int, adapter: AdapterJob) -> None:
        """Start `adapter` in `slot`, as a run alone would; nothing is loaded anew.

        Raises:
            UnknownTargetError: Its rank or targets are not in this pack's bank.
        """
        self.adapters.init_slot(slot, adapter.spec, seed=adapter.seed)
        self.adamw.reset_slot(slot)
        self.runs[slot] = _run(self.job, adapter)

    @contextmanager
    def routed(self, batch: MicroBatch, slots: Sequence[int], *, dropout_keys: Sequence[int] = ()) -> Iterator[None]:
        """Send block i of `batch` through `slots[i]`, forwards and backwards; without slots, all through the bare base.

        `dropout_keys`, one per segment, are those of `AdapterBank.rows`; with them, samples get their run's noise.
        """
        slot_of_segment = [slot for slot, count in zip(slots, batch.counts, strict=bool(slots)) for _ in range(count)]
        with ExitStack() as stack:
            stack.enter_context(self.loss.attention.samples(batch.lengths, batch.parents))
            if slots:
                rows = self.bank.rows(slot_of_segment, dropout_keys=dropout_keys, lengths=batch.lengths)
                stack.enter_context(rows)
            if dropout_keys:
                alphas = [self.runs[slot].job.neftune_noise_alpha for slot in slot_of_segment]
                stack.enter_context(self.loss.noise.samples(batch.lengths, alphas, dropout_keys))
            yield

    def leave(self, slot: int) -> None:
        """Empty `slot`."""
        del self.runs[slot]
        self.adapters.clear_slot(slot)


def _run(job: TrainJob, adapter: AdapterJob) -> Run:
    return Run(
        job=adapter,
        order=DataOrder(
            lengths=lengths_of(job.samples),
            batch_size=job.batch_size,
            seed=adapter.seed,
        ),
        trained_counts=trained_counts_of(job.samples),
        schedule=lr_schedule(
            adapter.lr_scheduler_type,
            num_warmup_steps=adapter.num_warmup_steps,
            num_training_steps=adapter.num_steps,
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSize:
    """The largest adapters that a pack can hold."""

    num_slots: int
    max_r: int
    target_modules: tuple[str, ...]


def size_of(adapters: Sequence[AdapterJob]) -> PackSize:
    """Return the size that holds exactly `adapters`."""
    return PackSize(
        num_slots=len(adapters),
        max_r=max(adapter.spec.r for adapter in adapters),
        target_modules=tuple(sorted({target for adapter in adapters for target in adapter.spec.target_modules})),
    )


def build_pack(
    job: TrainJob,
    model: PreTrainedModel,
    accelerator: Accelerator,
    *,
    size: PackSize | None = None,
) -> Pack:
    """Make `model` what the job trains, whole or frozen with adapters, and prepare everything for this worker.

    `size` makes room for adapters that enter later.
    """
    bank = _trained_part(job, model, size)
    if isinstance(bank, AdapterBank) and job.deepspeed_zero is None:  # ZeRO-3 gathers weights module by module
        make_lean(model)
    _rest_dropout(model)
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = PackLoss(model)
    prepared = prepare(job, accelerator, loss, bank)
    return Pack(
        job=job,
        accelerator=accelerator,
        model=model,
        bank=bank,
        loss=loss,
        module=prepared.module,
        adamw=prepared.adamw,
        optimizer=prepared.optimizer,
        complete_gradients=prepared.complete_gradients,
        runs={slot: _run(job, adapter) for slot, adapter in enumerate(job.adapters)},
        # A window of attention sees positions of one sample after the other, not an opening that several share.
        opening=opening_of(job.samples) if getattr(model.config, "sliding_window", None) is None else (),
    )


def _trained_part(job: TrainJob, model: PreTrainedModel, size: PackSize | None) -> AdapterBank | WholeModel:
    """Return the job's adapters at their start, or all of `model`. ZeRO takes the values over when it prepares them."""
    if job.adapters and job.adapters[0].spec == NO_ADAPTER:
        return WholeModel(model)
    size = size or size_of(job.adapters)
    bank = AdapterBank(model, num_slots=size.num_slots, max_r=size.max_r, target_modules=size.target_modules)
    for slot, adapter in enumerate(job.adapters):
        bank.init_slot(slot, adapter.spec, seed=adapter.seed)
    return bank


def _rest_dropout(model: nn.Module) -> None:
    # GPT-2's own dropout draws from one generator for the whole batch, so a run's losses would depend on its
    # neighbours and on the workers. What regularizes an adapter is its `lora_dropout`.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
