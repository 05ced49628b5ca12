"""A training job as the benchmark wants it."""

from transformers import PreTrainedTokenizerBase

from benchmarks.training_run import LEARNING_RATE, R, RunSettings
from cluster.catalog import find
from cluster.models.adapter_spec import AdapterSpec
from train_jobs.data import read_data_file
from train_jobs.job import AdapterJob, TrainJob
from train_jobs.tokens import whole_samples


def job_of(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> TrainJob:
    """Return the job of one adapter on every linear layer."""
    card = find(settings.model)
    examples = read_data_file(settings.data).examples
    pairs = whole_samples(
        examples,
        tokenizer,
        max_length=card.max_position_embeddings,
        stop_token_ids=card.stop_token_ids,
        train_on="last",  # what TRL trains of a prompt and its completion
    )
    adapter = AdapterJob(
        spec=AdapterSpec(r=R, lora_alpha=2 * R, target_modules=card.target_modules, lora_dropout=settings.lora_dropout),
        seed=0,
        num_steps=settings.num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        num_warmup_steps=0,
    )
    return TrainJob(
        card=card,
        precision=settings.precision,  # type: ignore[arg-type]
        compute_dtype="float32",
        adapters=(adapter,),
        samples=[sample for _, found in pairs if isinstance(found, list) for sample in found],
        held_out=(),
        questions=(),
        batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        deepspeed_zero=None,
        checkpoint_steps=settings.num_steps,
        num_threads=settings.num_threads,
    )
