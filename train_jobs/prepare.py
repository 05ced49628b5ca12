"""From a request to a job: everything that can be checked is checked here, on the driver, before a worker starts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.model_card import ModelCard
from cluster.models.adapter_spec import AdapterSpec
from cluster.models.base import load_tokenizer
from cluster.ollama_template import NoOllamaTemplate, ollama_template
from cluster.plan import TrainingPlan
from cluster.plan_acceptance import RESULT_RUNS_ON
from cluster.presets import LoraPreset, zero_optimization
from train_jobs.arguments import Request
from train_jobs.data import (
    HELD_OUT_SHARE,
    MAX_HELD_OUT,
    examples_at,
    held_out_examples,
    source_name,
    source_sha256,
)
from train_jobs.formats import PLAIN_TEXT
from train_jobs.job import NO_ADAPTER, AdapterJob, Question, TrainJob
from train_jobs.progress import announce
from train_jobs.questions import run_questions
from train_jobs.records import DataError
from train_jobs.token_block import TokenRule
from train_jobs.token_cache import token_store
from train_jobs.token_store import TokenStore, lengths_of
from train_jobs.tokenized import TokenizedData

NUM_CHECKPOINTS = 10
"""Checkpoints over a run, unless asked otherwise: a killed worker costs a tenth of it at most."""
MIN_STEPS_PER_EPOCH = 10
"""Below it the batch is large for the data: few updates teach little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the samples to train on come from."""

    name: str
    """Of the file, without its folder, or of the data set on the hub."""
    sha256: str
    format: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The user's files, tokenized and split."""

    file: Source
    train: TokenizedData
    held_out: TokenizedData
    questions: tuple[Question, ...]


def read_data(request: Request, plan: TrainingPlan) -> Data:
    """Return the training and held-out samples.

    Raises:
        DataError: A file that cannot be trained on; file, line and reason are named.
        StoreNotWritable: There is no room for the tokens.
    """
    sha256 = source_sha256(request.data)
    store = token_store(request.data, sha256, plan.card, _rule_of(request, plan))
    if request.eval_data is None:
        train, held_out = _split(store, request.seed)
        numbers: Sequence[int] = np.unique(held_out.examples).tolist()
        num_cut = 0
    else:
        numbers = range(MAX_HELD_OUT)
        eval_sha256 = source_sha256(request.eval_data)
        train, held_out = store, token_store(request.eval_data, eval_sha256, plan.card, _rule_of(request, plan))
        num_cut = held_out.facts.num_cut
    asked = examples_at(request.eval_data or request.data, numbers)
    data = Data(
        file=Source(name=source_name(request.data), sha256=sha256, format=store.facts.format),
        train=TokenizedData(samples=train, num_cut=store.facts.num_cut),
        held_out=TokenizedData(samples=held_out, num_cut=num_cut),
        questions=run_questions(asked, load_tokenizer(plan.card)),
    )
    _announce(data, plan)
    return data


def train_samples(request: Request, plan: TrainingPlan) -> TokenStore:
    """Return the samples that `read_data` would train on; raises what it raises."""
    store = token_store(request.data, source_sha256(request.data), plan.card, _rule_of(request, plan))
    if request.eval_data is not None:
        return store
    return _split(store, request.seed)[0]


def _rule_of(request: Request, plan: TrainingPlan) -> TokenRule:
    """Return how the run's text becomes tokens."""
    return TokenRule(
        max_length=plan.max_length, stop_token_ids=tuple(plan.card.stop_token_ids), train_on=request.train_on
    )


def _split(store: TokenStore, seed: int) -> tuple[TokenStore, TokenStore]:
    """Return the samples to train on, and a tenth to hold out."""
    if store.facts.num_examples == 1 and store.facts.format == PLAIN_TEXT:
        is_trained, is_held_out = _ends_of_text(store)
    else:
        is_held_out = np.isin(store.examples, held_out_examples(store.facts.num_examples, seed=seed))
        is_trained = ~is_held_out
    train, held_out = (store.take(np.flatnonzero(mask).astype(np.int32)) for mask in (is_trained, is_held_out))
    return train, held_out


def _ends_of_text(store: TokenStore) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which pieces of the one text in `store` lie before its last tenth, and which lie in it.

    That border is where it is however long the pieces are, so that no trial of a search trains on what another one,
    with other pieces, holds out.
    """
    ends = np.cumsum(lengths_of(store))
    border = ends[-1] * (1 - HELD_OUT_SHARE)
    before, behind = ends <= border, ends - lengths_of(store) >= border
    if not (before.any() and behind.any()):
        raise DataError(
            f"One text of {ends[-1]} tokens is too short to hold out a tenth; add more, or give --eval-data."
        )
    return before, behind


def _announce(data: Data, plan: TrainingPlan) -> None:
    train = data.train
    announce(
        "data",
        f"{data.file.format}: {len(train.samples)} samples to train on ({train.num_tokens} tokens, "
        f"{train.num_trained_tokens} of them with a loss), {len(data.held_out.samples)} held out, "
        f"{len(data.questions)} of them to be answered before and after",
    )
    if num_cut := train.num_cut + data.held_out.num_cut:
        text = f"{num_cut} samples are longer than {plan.max_length} tokens; what is beyond is not trained on"
        announce("warning", text)


def build_job(request: Request, plan: TrainingPlan, data: Data) -> TrainJob:
    """Return the job that carries out `plan` on `data`."""
    steps_per_epoch = -(-len(data.train.samples) // plan.effective_batch_size)
    if steps_per_epoch < MIN_STEPS_PER_EPOCH and plan.effective_batch_size > 2 * plan.num_workers:
        announce(
            "warning",
            f"A pass over {len(data.train.samples)} dialogues is only {steps_per_epoch} "
            f"step{'s' * (steps_per_epoch != 1)} of {plan.effective_batch_size}; little data wants smaller "
            f"batches, such as --set micro_batch_size=2 --set gradient_accumulation_steps=1",
        )
    num_steps = request.max_steps or max(1, round(request.epochs * steps_per_epoch))
    num_warmup_steps, message = plan.learning_rate_preset.clamp(num_steps)
    if message:
        announce("warning", message)
    hardware = plan.hardware
    return TrainJob(
        card=plan.card,
        precision=plan.precision,
        compute_dtype=plan.compute_dtype,
        adapters=(
            AdapterJob(
                spec=_spec(plan.lora),
                seed=request.seed,
                num_steps=num_steps,
                learning_rate=plan.learning_rate,
                lr_scheduler_type=plan.learning_rate_preset.lr_scheduler_type,
                num_warmup_steps=num_warmup_steps,
                weight_decay=plan.regularization.weight_decay,
                max_grad_norm=plan.regularization.max_grad_norm,
                neftune_noise_alpha=plan.regularization.neftune_noise_alpha,
                loraplus_lr_ratio=plan.lora.loraplus_lr_ratio if plan.lora else 1.0,
            ),
        ),
        samples=data.train.samples,
        held_out=data.held_out.samples,
        questions=data.questions,
        batch_size=plan.effective_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing=plan.gradient_checkpointing,
        strategy=plan.strategy,
        deepspeed_zero=_deepspeed_zero(plan),
        checkpoint_steps=request.checkpoint_steps or -(-num_steps // NUM_CHECKPOINTS),
        eval_steps=request.eval_steps,
        early_stopping_patience=request.early_stopping_patience,
        num_threads=max(1, hardware.num_cpus // plan.num_workers),
    )


def _spec(lora: LoraPreset | None) -> AdapterSpec:
    if lora is None:
        return NO_ADAPTER
    return AdapterSpec(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
    )


def _deepspeed_zero(plan: TrainingPlan) -> dict[str, object] | None:
    if plan.strategy != "deepspeed":
        return None
    section = zero_optimization(
        stage=plan.zero_stage, offload_optimizer=plan.offload_optimizer, offload_param=plan.offload_param
    )
    return dict(section)


def tell_acceptance(plan: TrainingPlan) -> None:
    """Say which engines will take the result, and whether Ollama can be given its prompts."""
    decision = next(d for d in plan.decisions if d.field == RESULT_RUNS_ON)
    announce("engines", f"the result will run on {decision.value} ({decision.reason})", engines=decision.value)
    tokenizer = load_tokenizer(plan.card)
    if tokenizer.chat_template is not None:
        try:
            ollama_template(tokenizer, plan.card.stop_token_ids)
        except NoOllamaTemplate as error:
            announce("warning", str(error))


def describe(card: ModelCard, plan: TrainingPlan, job: TrainJob) -> str:
    """Return the plan in one line."""
    (adapter,) = job.adapters
    spec = adapter.spec
    trained = f"r={spec.r}, lora_alpha={spec.lora_alpha}" if plan.lora else "all weights"
    return (
        f"{card.name}: {plan.method} on a base in {plan.precision}, {trained}, "
        f"learning rate {adapter.learning_rate:.1e} ({adapter.lr_scheduler_type}), {adapter.num_steps} steps of "
        f"{job.batch_size} dialogues on {plan.num_workers} workers ({plan.strategy})"
    )
