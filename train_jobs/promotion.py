"""Whether a version may take the place of another: both answer the same file, on the same base, in this process.

Not through the endpoint: it does not tell the loss of a given text, and its answers may come while others load it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from cluster.errors import UserError
from cluster.model_card import ModelCard, Precision
from cluster.models.base import LoadedBase, load_base
from cluster.models.fingerprint import ensure_same_base
from cluster.models.peft_files import read_spec
from cluster.registry import AdapterVersion, Registry
from train_jobs.data import read_data_file
from train_jobs.evaluate import evaluate
from train_jobs.job import AdapterJob, Question, TrainJob
from train_jobs.messages import Dialogue, Document
from train_jobs.pack import Pack, build_pack
from train_jobs.strategy import accelerator_for
from train_jobs.tokens import prompt_ids, tokenize

Metric = Literal["loss", "exact_match"]
MAX_LENGTH = 2048
"""Tokens of a sample that count for the loss."""
EXTRA_ANSWER_TOKENS = 8
"""How much longer than the expected one an answer may be."""
LOSS_NOISE = 1e-5
"""Relative difference that the same weights may show in another slot."""


class NotBetter(UserError, ValueError):
    """The candidate is worse than what it would take the place of, or there is nothing to compare them on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How two versions do on one file."""

    metric: Metric
    current: float
    candidate: float
    num_samples: int
    """Dialogues or texts of the loss, or answers that were compared."""

    @property
    def is_worse(self) -> bool:
        """Return whether the candidate is worse: a higher loss, or a smaller share of right answers."""
        if self.metric == "loss":
            return not self.candidate <= self.current * (1 + LOSS_NOISE)  # so that a NaN is worse
        return self.candidate < self.current


def compare(
    card: ModelCard, current: AdapterVersion, candidate: AdapterVersion, *, source: str | Path, metric: Metric
) -> Comparison:
    """Return how both versions do on the data in `source`, on the base in the precision the candidate was trained on.

    The loss is that of training, over what training would train. An exact match is a greedy answer that equals the
    last one of its dialogue, or contains its `answer_contains` where there is one; white space around does not count.

    Raises:
        DataError: the file cannot be read.
        NotBetter: it has no answer to compare with.
        WrongBase, BrokenAdapter: one of the versions cannot run on this base.
    """
    examples = read_data_file(source).examples
    base = load_base(card, precision=cast("Precision", candidate.manifest.precision))
    wanted = _wanted_answers(examples, base.tokenizer) if metric == "exact_match" else []
    if metric == "exact_match" and not wanted:
        raise NotBetter(f"{source} has no dialogue that ends in an answer; use --metric loss.")
    pack = _pack(card, base, (current, candidate), examples, tuple(question for question, _ in wanted))
    evaluations = [evaluate(pack, base.tokenizer, slot=slot) for slot in range(2)]
    if metric == "loss":
        scores = [evaluation.loss for evaluation in evaluations]
    else:
        scores = [_share_right(evaluation.answers, wanted) for evaluation in evaluations]
    num_samples = len(wanted) if metric == "exact_match" else len(pack.job.held_out)
    return Comparison(metric=metric, current=scores[0], candidate=scores[1], num_samples=num_samples)


def ensure_not_worse(comparison: Comparison, current: AdapterVersion, candidate: AdapterVersion) -> None:
    """Raise `NotBetter` if the candidate is worse."""
    if comparison.is_worse:
        raise NotBetter(
            f"{candidate.served_name} is worse than version {current.version}: {comparison.metric} "
            f"{comparison.candidate:.4f} against {comparison.current:.4f} on {comparison.num_samples} samples; "
            f"nothing was promoted."
        )


def _wanted_answers(
    examples: Sequence[Dialogue | Document], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Question, bool]]:
    """Return what to ask, and whether the whole answer has to be what is expected."""
    wanted = []
    for dialogue in examples:
        if isinstance(dialogue, Document):
            continue
        messages = dialogue.as_dicts()
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        reference = str(messages[last]["content"]).strip()
        if reference:
            question = Question(
                prompt_ids=tuple(prompt_ids(messages[:last], tokenizer, dialogue.tools)),
                answer_contains=dialogue.answer_contains or reference,
                max_new_tokens=len(tokenizer(reference, add_special_tokens=False).input_ids) + EXTRA_ANSWER_TOKENS,
            )
            wanted.append((question, dialogue.answer_contains is None))
    return wanted


def _share_right(answers: Sequence[str], wanted: Sequence[tuple[Question, bool]]) -> float:
    right = [
        answer.strip() == question.answer_contains if is_whole else question.answer_contains in answer
        for answer, (question, is_whole) in zip(answers, wanted, strict=True)
    ]
    return sum(right) / len(right)


def _pack(
    card: ModelCard,
    base: LoadedBase,
    versions: Sequence[AdapterVersion],
    examples: Sequence[Dialogue | Document],
    questions: tuple[Question, ...],
) -> Pack:
    """Return the base with `versions` in its slots, in order, and the examples as held-out part."""
    registry = Registry.default()
    for version in versions:
        ensure_same_base(version, card)
    folders = [registry.fetch(version) for version in versions]
    max_length = min(MAX_LENGTH, card.max_position_embeddings)
    samples = tokenize(examples, base.tokenizer, max_length=max_length, stop_token_ids=card.stop_token_ids).samples
    job = TrainJob(
        card=card,
        precision=base.precision,
        compute_dtype="float32",
        # Nothing is trained: of these, only the shapes are used.
        adapters=tuple(
            AdapterJob(
                spec=read_spec(f),
                seed=0,
                num_steps=1,
                learning_rate=0.0,
                lr_scheduler_type="linear",
                num_warmup_steps=0,
            )
            for f in folders
        ),
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
    pack = build_pack(job, base.model, accelerator_for(job))
    for slot, folder in enumerate(folders):
        pack.bank.load_slot(slot, folder)
    return pack
