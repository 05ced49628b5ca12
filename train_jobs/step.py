"""One optimizer step of every run in a pack.

K = adapters in the pass.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType

from cluster.activations import PASS_TOKENS, num_cpu_passes
from cluster.models.banked_linear import mix
from cluster.models.whole_model import WholeModel
from train_jobs.batches import MicroBatch, chunk, collate, passes_of
from train_jobs.fsdp import whole
from train_jobs.pack import Pack, Run
from train_jobs.packed_adamw import clip_by_adapter
from train_jobs.tokens import IGNORED, Sample

OPENING = 2**32
"""In the place of a sample's number: the dropout of an opening is the same wherever samples are cut apart."""
FILLER = Sample(input_ids=(0,), labels=(IGNORED,))
"""Takes part for an adapter that has no sample left: the last batch of an epoch may be shorter than the chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackStep:
    """One optimizer step of each run that took part, in the order of `slots`."""

    slots: tuple[int, ...]
    losses: tuple[float, ...]
    """The mean over the run's own trained tokens, before the update."""
    learning_rates: tuple[float, ...]
    grad_norms: tuple[float, ...]
    """Before clipping; empty under DeepSpeed, which clips by itself."""
    num_tokens: int
    """Tokens of all workers that are no padding, prompts included."""
    duration_s: float


def train_step(pack: Pack, steps: Mapping[int, int]) -> PackStep:
    """Make the optimizer step `steps[slot]`, counting from 0, of each run that `steps` names.

    The loss is the sum over runs of the mean over that run's own trained tokens, of all workers and micro-batches.
    Then each adapter's gradient is that of a run alone.
    """
    started = time.monotonic()
    job, accelerator = pack.job, pack.accelerator
    active = sorted(steps)
    batches = [pack.runs[slot].order.batch(steps[slot]) for slot in active]
    # By what is known of them: most samples of a batch are other workers' to read.
    counts = [int(pack.runs[slot].trained_counts[batch].sum()) for slot, batch in zip(active, batches, strict=True)]
    num_trained = torch.tensor(counts, device=accelerator.device)
    learning_rates = _set_rates(pack, steps)
    sums = torch.zeros(len(active), device=accelerator.device)
    norms: tuple[float, ...] = ()
    # Workers and accelerate's accumulation average gradients; the loss is divided by all trained tokens already.
    factor = accelerator.num_processes * job.gradient_accumulation_steps
    pack.module.train()
    for micro_step in range(job.gradient_accumulation_steps):
        with accelerator.accumulate(pack.module):
            for part in _passes(pack, active, batches):
                slots = [active[i] for i in part]
                cuts = list(_micro_batches(pack, steps, {active[i]: batches[i] for i in part}, micro_step))
                for number, (batch, keys) in enumerate(cuts, start=1):
                    exchange = _exchange(pack, is_last=number == len(cuts))
                    with exchange, pack.routed(batch, slots, dropout_keys=keys):
                        block_sums = pack.module(batch)
                        accelerator.backward((block_sums / num_trained[part.start : part.stop]).sum() * factor)
                    sums[part.start : part.stop] += block_sums.detach()
                    del block_sums  # and its graph, with all that a layer may keep in it by itself
            if accelerator.sync_gradients:
                pack.complete_gradients()
                norms = _clip(pack, active)
            pack.optimizer.step()
            pack.optimizer.zero_grad()
    losses = accelerator.reduce(sums, "sum") / num_trained
    return PackStep(
        slots=tuple(active),
        losses=tuple(losses.tolist()),
        learning_rates=learning_rates,
        grad_norms=norms,
        num_tokens=sum(
            int(pack.runs[slot].order.lengths[batch].sum()) for slot, batch in zip(active, batches, strict=True)
        ),
        duration_s=time.monotonic() - started,
    )


def _exchange(pack: Pack, *, is_last: bool) -> AbstractContextManager[None]:
    """Return in what a pass runs: DDP's workers, which may make different numbers of them, exchange gradients last."""
    if is_last or pack.accelerator.distributed_type == DistributedType.NO:
        return nullcontext()
    return pack.accelerator.no_sync(pack.module)  # type: ignore[no-any-return]


def _set_rates(pack: Pack, steps: Mapping[int, int]) -> tuple[float, ...]:
    runs = [pack.runs[slot].job if slot in steps else None for slot in range(pack.bank.num_slots)]
    rates = {slot: _rate(pack.runs[slot], step) for slot, step in sorted(steps.items())}
    for group in pack.optimizer.param_groups:
        group["active"] = [run is not None for run in runs]
        group["num_steps"] = [steps.get(slot, 0) + 1 for slot in range(len(runs))]
        group["weight_decay"] = [run.weight_decay if run else 0.0 for run in runs]
        group["lr"] = [
            rates[slot] * (run.loraplus_lr_ratio if group["is_lora_b"] else 1.0) if run else 0.0
            for slot, run in enumerate(runs)
        ]
    return tuple(rates.values())


def _rate(run: Run, step: int) -> float:
    return run.job.learning_rate * run.schedule(step)


def _clip(pack: Pack, active: Sequence[int]) -> tuple[float, ...]:
    if pack.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ()
    if isinstance(pack.bank, WholeModel):
        norm = pack.accelerator.clip_grad_norm_(pack.module.parameters(), pack.runs[0].job.max_grad_norm)
        return (float(whole(norm)),)
    pack.accelerator.unscale_gradients()
    max_norms = [pack.runs[k].job.max_grad_norm if k in active else 1.0 for k in range(pack.bank.num_slots)]
    return clip_by_adapter(pack.optimizer.param_groups, max_norms, active)


def _passes(pack: Pack, active: Sequence[int], batches: Sequence[Sequence[int]]) -> list[range]:
    """Return which adapters go together, by their place in `active`."""
    if pack.accelerator.distributed_type != DistributedType.NO:
        return [range(len(active))]  # each backward pass is an exchange of gradients
    num_tokens = [_tokens_of(pack, slot, batch) for slot, batch in zip(active, batches, strict=True)]
    return passes_of(num_tokens, limit=PASS_TOKENS)


def pass_tokens(pack: Pack, slot: int, step: int) -> int:
    """Return the tokens that step `step` of the run in `slot` adds to each of its passes."""
    return _tokens_of(pack, slot, pack.runs[slot].order.batch(step))


def _tokens_of(pack: Pack, slot: int, batch: Sequence[int]) -> int:
    return int(pack.runs[slot].order.lengths[batch].sum()) // pack.job.gradient_accumulation_steps


def _micro_batches(
    pack: Pack, steps: Mapping[int, int], batches: Mapping[int, Sequence[int]], micro_step: int
) -> Iterator[tuple[MicroBatch, list[int]]]:
    """Yield this worker's samples, a block per adapter, and the key of each segment's dropout, pass by pass."""
    job, accelerator = pack.job, pack.accelerator
    num_chunks = job.gradient_accumulation_steps * accelerator.num_processes
    index = micro_step * accelerator.num_processes + accelerator.process_index
    chunks = {slot: chunk(len(batch), num_chunks, index) for slot, batch in batches.items()}
    num_passes = _num_cuts(pack, batches, chunks)
    for number in range(num_passes):  # cut as micro-batches are: each pass gets short and long samples
        yield _micro_batch(pack, steps, batches, {slot: chunks[slot][number::num_passes] for slot in batches})


def _num_cuts(pack: Pack, batches: Mapping[int, Sequence[int]], chunks: Mapping[int, range]) -> int:
    """Return in how many passes an adapter that goes alone takes its samples on a CPU."""
    if len(batches) > 1 or pack.accelerator.device.type != "cpu" or not _may_cut(pack):
        return 1
    ((slot, batch),) = batches.items()
    lengths = pack.runs[slot].order.lengths[[batch[i] for i in chunks[slot]]]
    num_tokens = int(lengths.sum()) - max(0, len(lengths) - 1) * len(pack.opening)
    return num_cpu_passes(num_tokens, num_samples=len(lengths))


def _may_cut(pack: Pack) -> bool:
    """Say whether a worker may make passes as it likes: what ZeRO and FSDP share, they fetch in each of them."""
    if pack.accelerator.distributed_type == DistributedType.NO:
        return True
    return pack.job.strategy == "ddp" and pack.job.deepspeed_zero is None


def _micro_batch(
    pack: Pack, steps: Mapping[int, int], batches: Mapping[int, Sequence[int]], chosen: Mapping[int, range]
) -> tuple[MicroBatch, list[int]]:
    """Return the `chosen` samples of the batches, a block per adapter, and the key of each segment's dropout."""
    blocks: list[Sequence[Sample]] = []
    keys: list[int] = []
    for slot, batch in batches.items():
        positions = chosen[slot]
        blocks.append([pack.job.samples[batch[i]] for i in positions] or [FILLER])
        keys += [mix(pack.runs[slot].job.seed, steps[slot], i) for i in positions] or [0]
    # NEFTune's noise goes by a sample's length, which an opening that several share does not have.
    is_noisy = any(pack.runs[slot].job.neftune_noise_alpha for slot in batches)
    made = collate(blocks, device=pack.accelerator.device, opening=() if is_noisy else pack.opening)
    shared = [mix(pack.runs[slot].job.seed, steps[slot], OPENING) for slot in batches]
    return made, [shared[s.block] if s.sample is None else keys[s.sample] for s in made.segments]
