"""Adapters that train together on one base, and one optimizer step of them.

B = rows, K = adapters in the pass.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from cluster.models.bank import AdapterBank
from cluster.models.banked_linear import mix
from train_jobs.batches import DataOrder, Rows, chunk, collate
from train_jobs.job import TrainJob
from train_jobs.loss import PackLoss
from train_jobs.packed_adamw import PackedAdamW, clip_by_adapter
from train_jobs.progress import StepMetrics
from train_jobs.schedule import lr_schedule
from train_jobs.tokens import IGNORED, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """What a worker holds for training: slot k of the bank is adapter k of the job."""

    job: TrainJob
    accelerator: Accelerator
    model: PreTrainedModel
    bank: AdapterBank
    loss: PackLoss
    """Around the model."""
    module: nn.Module
    """`loss`, prepared for several workers."""
    optimizer: torch.optim.Optimizer
    """`PackedAdamW`, prepared."""
    orders: tuple[DataOrder, ...]
    schedules: tuple[Callable[[int], float], ...]
    pad_token_id: int

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the longest run in the pack."""
        return max(adapter.num_steps for adapter in self.job.adapters)


def build_pack(job: TrainJob, model: PreTrainedModel, accelerator: Accelerator, *, pad_token_id: int) -> Pack:
    """Freeze `model`, put fresh adapters on it and prepare everything for this worker."""
    targets = {target for adapter in job.adapters for target in adapter.spec.target_modules}
    bank = AdapterBank(
        model,
        num_slots=len(job.adapters),
        max_r=max(adapter.spec.r for adapter in job.adapters),
        target_modules=sorted(targets),
    )
    for k, adapter in enumerate(job.adapters):
        bank.init_slot(k, adapter.spec, seed=adapter.seed)
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = PackLoss(model)
    # Every worker loads the base by itself: data parallelism need not send it around.
    frozen = [name for name, tensor in loss.named_parameters() if not tensor.requires_grad]
    loss._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in loss.named_buffers()]  # type: ignore[assignment]
    module, optimizer = accelerator.prepare(loss, PackedAdamW(bank.parameters(), num_slots=len(job.adapters)))
    lengths = tuple(len(sample.input_ids) for sample in job.samples)
    return Pack(
        job=job,
        accelerator=accelerator,
        model=model,
        bank=bank,
        loss=loss,
        module=module,
        optimizer=optimizer,
        orders=tuple(DataOrder(lengths=lengths, batch_size=job.batch_size, seed=a.seed) for a in job.adapters),
        schedules=tuple(
            lr_schedule(a.lr_scheduler_type, num_warmup_steps=a.num_warmup_steps, num_training_steps=a.num_steps)
            for a in job.adapters
        ),
        pad_token_id=pad_token_id,
    )


def train_step(pack: Pack, step: int) -> StepMetrics:
    """Make optimizer step `step`, counting from 0, of every adapter that is not at its end, and return its metrics.

    The loss is the sum over adapters of the mean over that adapter's own trained tokens, of all workers and
    micro-batches. Then each adapter's gradient is that of a run alone.
    """
    started = time.monotonic()
    job, accelerator = pack.job, pack.accelerator
    active = [k for k, adapter in enumerate(job.adapters) if step < adapter.num_steps]
    batches = [pack.orders[k].batch(step) for k in active]
    counts = [sum(job.samples[i].num_trained_tokens for i in batch) for batch in batches]
    num_trained = torch.tensor(counts, device=accelerator.device)
    learning_rates = _set_rates(pack, step, active)
    # The base's own dropout draws from torch's generator: from here on it depends on step and worker alone.
    torch.manual_seed(mix(job.adapters[0].seed, step, accelerator.process_index))
    sums = torch.zeros(len(active), device=accelerator.device)
    norms: tuple[float, ...] = ()
    # Workers and accelerate's accumulation average gradients; the loss is divided by all trained tokens already.
    factor = accelerator.num_processes * job.gradient_accumulation_steps
    pack.module.train()
    for micro_step in range(job.gradient_accumulation_steps):
        with accelerator.accumulate(pack.module):
            rows, keys = _micro_batch(pack, step, active, batches, micro_step)
            slots = [k for k in active for _ in range(len(rows.labels) // len(active))]
            with pack.bank.rows(slots, dropout_keys=keys):
                block_sums = pack.module(rows.input_ids, rows.labels, len(active))
                accelerator.backward((block_sums / num_trained).sum() * factor)
            sums += block_sums.detach()
            if accelerator.sync_gradients:
                norms = _clip(pack, active)
            pack.optimizer.step()
            pack.optimizer.zero_grad()
    losses = accelerator.reduce(sums, "sum") / num_trained
    return StepMetrics(
        step=step + 1,
        num_steps=pack.num_steps,
        losses=tuple(losses.tolist()),
        learning_rates=learning_rates,
        grad_norms=norms,
        num_tokens=sum(len(job.samples[i].input_ids) for batch in batches for i in batch),
        duration_s=time.monotonic() - started,
    )


def _set_rates(pack: Pack, step: int, active: Sequence[int]) -> tuple[float, ...]:
    adapters = pack.job.adapters
    group = pack.optimizer.param_groups[0]
    group["active"] = [k in active for k in range(len(adapters))]
    group["weight_decay"] = [adapter.weight_decay for adapter in adapters]
    group["lr"] = [a.learning_rate * schedule(step) for a, schedule in zip(adapters, pack.schedules, strict=True)]
    return tuple(group["lr"][k] for k in active)


def _clip(pack: Pack, active: Sequence[int]) -> tuple[float, ...]:
    if pack.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ()
    pack.accelerator.unscale_gradients()
    norms = clip_by_adapter(pack.bank.parameters(), [adapter.max_grad_norm for adapter in pack.job.adapters])
    return tuple(norms[list(active)].tolist())


def _micro_batch(
    pack: Pack, step: int, active: Sequence[int], batches: Sequence[Sequence[int]], micro_step: int
) -> tuple[Rows, list[int]]:
    """Return this worker's rows, a block of equal size per adapter, and the key of each row's dropout."""
    job, accelerator = pack.job, pack.accelerator
    num_chunks = job.gradient_accumulation_steps * accelerator.num_processes
    index = micro_step * accelerator.num_processes + accelerator.process_index
    chunks = [chunk(len(batch), num_chunks, index) for batch in batches]
    block = max(1, *map(len, chunks)) if len(chunks) > 1 else max(1, len(chunks[0]))
    # The last batch of an epoch may be short: a row without labels takes the place of a missing one.
    filler = Sample(input_ids=(pack.pad_token_id,), labels=(IGNORED,))
    samples: list[Sample] = []
    keys: list[int] = []
    for k, batch, positions in zip(active, batches, chunks, strict=True):
        missing = block - len(positions)
        samples += [job.samples[batch[i]] for i in positions] + [filler] * missing
        keys += [mix(job.adapters[k].seed, step, i) for i in positions] + [0] * missing
    return collate(samples, pad_token_id=pack.pad_token_id, device=accelerator.device), keys
