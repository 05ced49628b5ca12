"""How a model or an adapter does on a file, in this process: its loss, and which of its greedy answers are right."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from cluster.hardware import detect
from cluster.model_card import ModelCard, Precision
from cluster.models.base import load_base, load_tokenizer
from cluster.models.fingerprint import ensure_same_base
from cluster.models.peft_files import read_spec
from cluster.plan import plan_serving
from cluster.registry import AdapterVersion, Registry
from train_jobs.data import read_data_file
from train_jobs.evaluate import evaluate
from train_jobs.job import AdapterJob, Question, TrainJob
from train_jobs.messages import Dialogue, Document
from train_jobs.pack import Pack, PackSize, build_pack
from train_jobs.questions import all_questions
from train_jobs.scored import Score, answered
from train_jobs.strategy import accelerator_for
from train_jobs.tokenized import tokenize

MAX_LENGTH = 2048
"""Tokens of a sample that count for the loss."""


def score_here(card: ModelCard, version: AdapterVersion | None, *, source: str | Path, limit: int | None) -> Score:
    """Return how `version`, or the bare base with None, does on the first `limit` examples of `source`.

    An adapter is asked on the base in the precision it was trained on, a base in the one it would be served in.

    Raises:
        DataError: The file cannot be read.
        DoesNotFit: This machine has too little memory for the base.
        WrongBase, BrokenAdapter: The version cannot run on this base.
    """
    file = read_data_file(source)
    wanted = cast("Precision", version.manifest.precision) if version else None
    precision = plan_serving(card, detect(), precision=wanted, engine="transformers").precision
    examples = file.examples[:limit]
    versions = (version,) if version else ()
    pack, tokenizer = evaluation_pack(card, precision, versions, examples, asks=True)
    evaluation = evaluate(pack, tokenizer, slot=0 if version else None)
    return Score(
        model=version.served_name if version else card.name,
        precision=precision,
        data=file.name,
        data_sha256=file.sha256,
        num_samples=len(examples),
        loss=evaluation.loss,
        answers=answered(pack.job.questions, evaluation.answers),
    )


def evaluation_pack(
    card: ModelCard,
    precision: Precision,
    versions: Sequence[AdapterVersion],
    examples: Sequence[Dialogue | Document],
    *,
    asks: bool,
) -> tuple[Pack, PreTrainedTokenizerBase]:
    """Return the base with `versions` in its slots, in order, and the examples as its held-out part.

    With `asks`, the answers of the dialogues are held-out questions.
    """
    for version in versions:
        ensure_same_base(version, card)
    registry = Registry.default()
    folders = [registry.fetch(version) for version in versions]
    tokenizer = load_tokenizer(card)
    job = _job(
        card,
        precision,
        examples,
        tokenizer,
        adapters=tuple(_adapter(folder) for folder in folders),
        questions=all_questions(examples, tokenizer) if asks else (),
    )
    accelerator = accelerator_for(job)
    base = load_base(card, precision=precision, device=accelerator.device)
    bare = PackSize(num_slots=1, max_r=1, target_modules=card.target_modules[:1])  # a bank with nothing in it
    pack = build_pack(job, base.model, accelerator, size=None if folders else bare)
    for slot, folder in enumerate(folders):
        pack.adapters.load_slot(slot, folder)
    return pack, tokenizer


def _adapter(folder: Path) -> AdapterJob:
    # Nothing is trained: of all this, only the shapes are used.
    return AdapterJob(
        spec=read_spec(folder),
        seed=0,
        num_steps=1,
        learning_rate=0.0,
        lr_scheduler_type="linear",
        num_warmup_steps=0,
    )


def _job(
    card: ModelCard,
    precision: Precision,
    examples: Sequence[Dialogue | Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapters: tuple[AdapterJob, ...],
    questions: tuple[Question, ...],
) -> TrainJob:
    max_length = min(MAX_LENGTH, card.max_position_embeddings)
    samples = tokenize(examples, tokenizer, max_length=max_length, stop_token_ids=card.stop_token_ids).samples
    return TrainJob(
        card=card,
        precision=precision,
        compute_dtype="float32",
        adapters=adapters,
        samples=samples,
        held_out=samples,
        questions=questions,
        batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        deepspeed_zero=None,
        checkpoint_steps=1,
        num_threads=1,
    )
