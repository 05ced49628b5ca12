"""A training job that needs all the memory that its settings may need."""

from benchmarks.adapter_files import MODEL
from benchmarks.memory_run import NUM_STEPS, MemorySettings, R, random_tokens
from cluster.catalog import find
from cluster.models.adapter_spec import AdapterSpec
from train_jobs.job import NO_ADAPTER, AdapterJob, TrainJob
from train_jobs.tokens import Sample


def job_of(settings: MemorySettings) -> TrainJob:
    """Return the job of one adapter on every linear layer, or of the whole model."""
    card = find(MODEL)
    batch_size = settings.micro_batch_size * settings.gradient_accumulation_steps * settings.num_workers
    spec = AdapterSpec(r=R, lora_alpha=2 * R, target_modules=card.target_modules, lora_dropout=settings.lora_dropout)
    adapter = AdapterJob(
        spec=NO_ADAPTER if settings.method == "full" else spec,
        seed=0,
        num_steps=NUM_STEPS,
        learning_rate=1e-5,
        lr_scheduler_type="linear",
        num_warmup_steps=0,
    )
    rows = random_tokens(settings, batch_size * NUM_STEPS, card.vocab_size)
    return TrainJob(
        card=card,
        precision=settings.precision,  # type: ignore[arg-type]
        compute_dtype="float32",
        adapters=(adapter,),
        samples=[Sample(input_ids=row, labels=row) for row in rows],
        held_out=(),
        questions=(),
        batch_size=batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        deepspeed_zero=None,
        checkpoint_steps=NUM_STEPS,
        num_threads=1,
    )
