"""One training run in a process of its own: `python -m benchmarks.training_run kajiya|trl '{...}'` prints its numbers.

Both train the same adapters on the same dialogues in batches of the same size, in float32 unless told otherwise.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

R = 8
LEARNING_RATE = 1e-4
WARM_UP_STEPS = 1
"""Not timed: the first step allocates."""
PROBE = 1024
"""Width of the square matrices whose product shows what the machine can do just now; small beside a run's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What is trained, and how."""

    model: str
    data: str
    """A file of OpenAI messages, one dialogue a line, each of a prompt and an answer."""
    batch_size: int
    num_steps: int
    num_threads: int
    precision: str = "fp32"
    gradient_checkpointing: bool | None = None
    """None: as it comes."""
    lora_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunNumbers:
    """What came of it."""

    num_tokens: int
    """That are no padding, in the timed steps."""
    num_trained_tokens: int
    """Of these, those that have a label."""
    seconds: float
    """Of the timed steps."""
    peak_bytes: int
    """Largest resident size of the process."""
    losses: list[float]
    """Of each step."""
    matmul_flop_per_s: float
    """Of large float32 products by torch's own library between the steps: the median."""
    own_flop_per_s: float | None
    """The same of the products that our steps are made of; None where nobody looked."""
    max_batch_tokens: int
    """Tokens of the largest step."""

    @property
    def tokens_per_s(self) -> float:
        """Return the speed."""
        return self.num_tokens / self.seconds


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rates(product: Callable[[Any, Any], Any]) -> Iterator[float]:
    """Yield what large float32 products reach, in FLOP/s, each time it is asked for."""
    import torch

    a, b = torch.ones(PROBE, PROBE), torch.ones(PROBE, PROBE)
    product(a, b)
    while True:
        begin = time.perf_counter()
        product(a, b)
        yield 2 * PROBE**3 / (time.perf_counter() - begin)


def run_kajiya(settings: RunSettings) -> RunNumbers:
    """Train with our own steps, as a worker does."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    import train_jobs.worker  # noqa: F401 -- what a worker imports counts
    from benchmarks.training_job import job_of
    from cluster.catalog import find
    from cluster.models.base import load_base
    from cluster.models.products import times
    from train_jobs.pack import build_pack
    from train_jobs.step import train_step
    from train_jobs.strategy import accelerator_for

    torch.set_num_threads(settings.num_threads)
    disable_progress_bar()
    card = find(settings.model)
    base = load_base(card, precision=settings.precision)  # type: ignore[arg-type]
    job = job_of(settings, base.tokenizer)
    pack = build_pack(job, base.model, accelerator_for(job))
    order = pack.runs[0].order
    rates, reached = (matmul_rates(torch.mm), matmul_rates(times)), []
    steps = []
    for step in range(settings.num_steps):
        steps.append(train_step(pack, {0: step}))
        reached.append([next(rate) for rate in rates])
    timed = range(WARM_UP_STEPS, settings.num_steps)
    return RunNumbers(
        num_tokens=sum(steps[i].num_tokens for i in timed),
        num_trained_tokens=sum(job.samples[s].num_trained_tokens for i in timed for s in order.batch(i)),
        seconds=sum(steps[i].duration_s for i in timed),
        peak_bytes=peak_bytes(),
        losses=[step.losses[0] for step in steps],
        matmul_flop_per_s=statistics.median(of_torch for of_torch, _ in reached),
        own_flop_per_s=statistics.median(own for _, own in reached),
        max_batch_tokens=max(step.num_tokens for step in steps),
    )


def run_trl(settings: RunSettings) -> RunNumbers:
    """Train with TRL's `SFTTrainer` as it comes; only the precision is set, since it would take bfloat16."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    from trl import SFTConfig, SFTTrainer

    from benchmarks.trl_steps import StepClock
    from cluster.catalog import find
    from cluster.models.base import source_of

    torch.set_num_threads(settings.num_threads)
    disable_progress_bar()
    card = find(settings.model)
    dialogues = [json.loads(line)["messages"] for line in Path(settings.data).read_text().splitlines()]
    chosen = {"gradient_checkpointing": settings.gradient_checkpointing}
    model = AutoModelForCausalLM.from_pretrained(source_of(card), dtype=torch.float32)
    clock = StepClock(model)
    output = tempfile.TemporaryDirectory(prefix="kajiya-bench-")  # deleted with this process
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(source_of(card)),
        train_dataset=Dataset.from_list([{"prompt": d[:-1], "completion": d[-1:]} for d in dialogues]),
        peft_config=LoraConfig(
            r=R,
            lora_alpha=2 * R,
            lora_dropout=settings.lora_dropout,
            target_modules=list(card.target_modules),
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=output.name,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=settings.batch_size,
            max_steps=settings.num_steps,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{key: value for key, value in chosen.items() if value is not None},
        ),
        callbacks=[clock],
    )
    trainer.train()
    timed = range(WARM_UP_STEPS, settings.num_steps)
    return RunNumbers(
        num_tokens=sum(clock.num_tokens[i] for i in timed),
        num_trained_tokens=sum(clock.num_trained_tokens[i] for i in timed),
        seconds=sum(clock.seconds[i] for i in timed),
        peak_bytes=peak_bytes(),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        matmul_flop_per_s=statistics.median(clock.matmul_flop_per_s),
        own_flop_per_s=None,
        max_batch_tokens=max(clock.num_tokens),
    )


def main() -> None:
    """Run and print the numbers as the last line."""
    name, settings = sys.argv[1], RunSettings(**json.loads(sys.argv[2]))
    numbers = {"kajiya": run_kajiya, "trl": run_trl}[name](settings)
    print(json.dumps(asdict(numbers)))


if __name__ == "__main__":
    main()
