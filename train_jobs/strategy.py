"""How workers share a step: plain data parallelism, or DeepSpeed's ZeRO. The loop knows neither."""

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

from train_jobs.job import TrainJob


def accelerator_for(job: TrainJob) -> Accelerator:
    """Return the accelerator of this worker, whose process group Ray Train has made."""
    has_gpu = torch.cuda.is_available()
    return Accelerator(
        cpu=not has_gpu,
        # fp16 needs loss scaling; under bf16 the base has that type already and the adapters stay in fp32.
        mixed_precision="fp16" if has_gpu and job.compute_dtype == "float16" else "no",
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        deepspeed_plugin=None if job.deepspeed_zero is None else _deepspeed(job),
    )


def _deepspeed(job: TrainJob) -> DeepSpeedPlugin:
    (adapter,) = job.adapters  # ZeRO flattens parameters, so it cannot tell one adapter of a pack from another
    return DeepSpeedPlugin(
        hf_ds_config={
            # DeepSpeed wants the number, but the batches are ours.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": job.gradient_accumulation_steps,
            "gradient_clipping": adapter.max_grad_norm,
            "zero_optimization": job.deepspeed_zero,
            "zero_allow_untested_optimizer": True,
            # Else offloading asks for DeepSpeed's own Adam, which compiles C++ at its first use.
            "zero_force_ds_cpu_optimizer": False,
        }
    )
