"""How workers share a step: DDP, nn.DataParallel, DeepSpeed's ZeRO, or FSDP. The loop knows none of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cluster.models.bank import AdapterBank
from cluster.models.whole_model import WholeModel
from train_jobs import fsdp
from train_jobs.job import TrainJob
from train_jobs.loss import PackLoss
from train_jobs.packed_adamw import PackedAdamW


def accelerator_for(job: TrainJob) -> Accelerator:
    """Return the accelerator of this worker, whose process group Ray Train has made."""
    has_gpu = torch.cuda.is_available()
    uses_deepspeed = job.deepspeed_zero is not None
    return Accelerator(
        # Told `cpu`, accelerate passes over DeepSpeed without a word; told its backend, it takes gloo.
        cpu=not has_gpu and not uses_deepspeed,
        kwargs_handlers=[] if has_gpu or not uses_deepspeed else [InitProcessGroupKwargs(backend="gloo")],
        # fp16 needs loss scaling; under bf16 the base has that type already and the adapters stay in fp32.
        mixed_precision="fp16" if has_gpu and job.compute_dtype == "float16" else "no",
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        deepspeed_plugin=None if job.deepspeed_zero is None else _deepspeed(job),
    )


def _deepspeed(job: TrainJob) -> DeepSpeedPlugin:
    assert job.deepspeed_zero is not None, "strategy deepspeed"
    (adapter,) = job.adapters  # ZeRO flattens parameters, so it cannot tell one adapter of a pack from another
    return DeepSpeedPlugin(
        hf_ds_config={
            # DeepSpeed wants the number, but the batches are ours.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": job.gradient_accumulation_steps,
            "gradient_clipping": adapter.max_grad_norm,
            "zero_optimization": job.deepspeed_zero | {"stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            # Else offloading asks for DeepSpeed's own Adam, which compiles C++ at its first use.
            "zero_force_ds_cpu_optimizer": False,
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a worker calls in a step, made ready for its strategy."""

    module: nn.Module
    """The loss, which sees to the exchange of gradients or parameters."""
    adamw: PackedAdamW
    optimizer: torch.optim.Optimizer
    """`adamw`, which steps when gradients are complete."""
    complete_gradients: Callable[[], None] = lambda: None
    """To call before a step: exchanges what the backward pass has not."""


def prepare(job: TrainJob, accelerator: Accelerator, loss: PackLoss, bank: AdapterBank | WholeModel) -> Prepared:
    """Return `loss` and an optimizer for what is trained in `bank`, ready for the job's strategy.

    Raises:
        UnsupportedModelError: The loss of this model is not that of its head on its last hidden states.
    """
    if not is_zero3(accelerator):
        loss.check_head()
    if job.strategy == "fsdp":
        fsdp.shard(loss, bank, accelerator.device)
        adamw = PackedAdamW(bank.groups(), num_slots=bank.num_slots)  # of the parts
        optimizer = accelerator.prepare(adamw)
        average = partial(fsdp.average_gradients, bank)
        return Prepared(module=loss, adamw=adamw, optimizer=optimizer, complete_gradients=average)
    # Every worker loads the base by itself: data parallelism need not send it around.
    frozen = [name for name, tensor in loss.named_parameters() if not tensor.requires_grad]
    loss._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in loss.named_buffers()]  # type: ignore[assignment]
    # DeepSpeed steps group by group and looks for the moments of all of them after the first: it gets one.
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    adamw = PackedAdamW(bank.parameters() if uses_deepspeed else bank.groups(), num_slots=bank.num_slots)
    module, optimizer = accelerator.prepare(loss, adamw)
    if job.strategy == "dp":  # it runs the module itself where there is one device or none
        module = nn.DataParallel(module)
    if is_zero3(accelerator):  # a forward pass finds whole parameters only now
        loss.check_head()
    if isinstance(bank, AdapterBank) and accelerator.distributed_type == DistributedType.NO:
        bank.place_grads()
        for group, of_bank in zip(adamw.param_groups, bank.groups(), strict=True):
            # accelerate copies groups; ranks have to be those of the adapters that will come and go.
            group |= {"views": {}, "ranks": of_bank["ranks"]}
    return Prepared(module=module, adamw=adamw, optimizer=optimizer)


def is_zero3(accelerator: Accelerator) -> bool:
    """Say whether DeepSpeed shards the parameters, from their loading on: then every pass takes all workers."""
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return uses_deepspeed and bool(accelerator.deepspeed_plugin.zero_stage == 3)


def is_sharded(accelerator: Accelerator, module: nn.Module) -> bool:
    """Say whether workers fetch each other's weights in every pass: then all must make the same passes."""
    return is_zero3(accelerator) or isinstance(module, FSDPModule)


def loading_device(job: TrainJob, accelerator: Accelerator) -> torch.device:
    """Return where a worker loads the base; a model that FSDP shards may not fit on one GPU."""
    return torch.device("cpu") if job.strategy == "fsdp" else accelerator.device
