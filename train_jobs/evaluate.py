"""How good the base or an adapter is on the held-out part: its loss there, and how many answers are right.

B = rows, T = tokens.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedTokenizerBase

from train_jobs.batches import collate
from train_jobs.fsdp import embeddings_and_head
from train_jobs.job import Question
from train_jobs.pack import Pack
from train_jobs.strategy import is_sharded
from train_jobs.token_store import lengths_of, trained_counts_of

Item = TypeVar("Item")

EVALUATION_ROWS = 32
EVALUATION_TOKENS = 4096
"""Rows of one evaluation pass, which keeps no activations, and its tokens, unless a row has more. Those of 32 long rows
would be the largest moment of a run: on SmolLM2, wide tensors and logits take 27 kB a token, a cache 46 kB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The outcome on the held-out part."""

    loss: float
    """Mean over all trained tokens of the held-out samples."""
    num_right: int
    """Questions whose greedy answer is right."""
    num_questions: int
    answers: tuple[str, ...]
    """The greedy answers, in the order of the questions."""


def evaluate(pack: Pack, tokenizer: PreTrainedTokenizerBase, *, slot: int | None) -> Evaluation:
    """Return how the adapter in `slot`, or the bare base with None, does on the job's held-out part.

    The workers share the work; every one of them gets the whole result.
    """
    loss = held_out_loss(pack, slot=slot)
    pack.module.eval()
    with torch.no_grad(), embeddings_and_head(pack.module):
        answers = _answers(pack, tokenizer, slot)
    pack.module.train()
    questions = pack.job.questions
    return Evaluation(
        loss=loss,
        num_right=sum(q.is_right(answer) for q, answer in zip(questions, answers, strict=True)),
        num_questions=len(questions),
        answers=tuple(answers),
    )


def held_out_loss(pack: Pack, *, slot: int | None) -> float:
    """Return the mean loss over all trained tokens of the held-out part; the workers share the work."""
    return to_the_end(_losses(pack, [] if slot is None else [slot]))[0]


def to_the_end(passes: Generator[None, None, Item]) -> Item:
    """Return the outcome of `passes`, made without a stop."""
    while True:
        try:
            next(passes)
        except StopIteration as stop:
            outcome: Item = stop.value
            return outcome


def held_out_losses(pack: Pack, slots: Sequence[int]) -> Generator[None, None, list[float]]:
    """Return the held-out loss of each adapter in `slots`; stop after each pass, for who has other things to do."""
    # An opening is computed once for all rows of an adapter in a pass: rather many rows than many adapters.
    together = max(1, EVALUATION_ROWS // max(1, len(pack.job.held_out)))
    losses: list[float] = []
    for start in range(0, len(slots), together):
        losses += yield from _losses(pack, slots[start : start + together])
    return losses


def _losses(pack: Pack, slots: Sequence[int]) -> Generator[None, None, list[float]]:
    """Return the loss of each adapter; without slots, that of the bare base. Stop after each pass."""
    num_blocks = max(1, len(slots))
    totals = torch.zeros(num_blocks, device=pack.accelerator.device, dtype=torch.float64)
    held_out = pack.job.held_out
    lengths = lengths_of(held_out)
    shortest_first = lengths.argsort(kind="stable").tolist()
    for indices in _my_share(pack, shortest_first, lengths.tolist(), num_blocks=num_blocks):
        totals += _sums(pack, slots, indices)
        yield
    summed = totals if _is_repeated(pack) else pack.accelerator.reduce(totals, "sum")
    count = int(trained_counts_of(held_out).sum())
    return [float(total) / count for total in summed]


@torch.no_grad()
def _sums(pack: Pack, slots: Sequence[int], indices: Sequence[int]) -> torch.Tensor:
    """Return the summed loss of each adapter over the held-out samples `indices`."""
    pack.module.eval()
    samples = [pack.job.held_out[i] for i in indices]
    batch = collate([samples] * max(1, len(slots)), device=pack.accelerator.device, opening=pack.opening)
    with pack.routed(batch, slots):
        sums: torch.Tensor = pack.loss(batch)
    pack.module.train()
    return sums


def _answers(pack: Pack, tokenizer: PreTrainedTokenizerBase, slot: int | None) -> list[str]:
    questions = pack.job.questions
    shortest_first = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt_ids))
    mine: list[tuple[int, str]] = []
    widths = [len(question.prompt_ids) + question.max_new_tokens for question in questions]
    for indices in _my_share(pack, shortest_first, widths):
        with _through(pack, slot, len(indices)):
            mine += zip(indices, _generate(pack, tokenizer, [questions[i] for i in indices]), strict=True)
    return [answer for _, answer in sorted(mine if _is_repeated(pack) else gather_object(mine))]


def _is_repeated(pack: Pack) -> bool:
    """Say whether every worker evaluates everything: where each pass takes all of them, none may make one more."""
    return is_sharded(pack.accelerator, pack.module)


def _my_share(
    pack: Pack, shortest_first: Sequence[int], num_tokens: Sequence[int], *, num_blocks: int = 1
) -> Iterator[Sequence[int]]:
    """Yield this worker's part in batches. Every worker gets its share of short and long ones, its batches do not.

    `num_tokens` are those of each row, which is there `num_blocks` times.
    """
    first, every = pack.accelerator.process_index, pack.accelerator.num_processes
    mine = shortest_first if _is_repeated(pack) else shortest_first[first::every]
    batch: list[int] = []
    for index in mine:
        rows = (len(batch) + 1) * num_blocks
        if batch and (rows > EVALUATION_ROWS or rows * num_tokens[index] > EVALUATION_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _through(pack: Pack, slot: int | None, num_rows: int) -> AbstractContextManager[None]:
    return nullcontext() if slot is None else pack.bank.rows([slot] * num_rows)


def _generate(pack: Pack, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """Return the greedy answers; prompts are padded on the left, so that all of them end where the answers begin."""
    width = max(len(question.prompt_ids) for question in questions)
    pad_token_id = tokenizer.pad_token_id
    input_ids = torch.full((len(questions), width), pad_token_id)  # [B, T]
    attention_mask = torch.zeros_like(input_ids)
    for row, question in enumerate(questions):
        input_ids[row, width - len(question.prompt_ids) :] = torch.tensor(question.prompt_ids)
        attention_mask[row, width - len(question.prompt_ids) :] = 1
    stops = sorted({*pack.job.card.stop_token_ids, tokenizer.eos_token_id} - {None})
    output = pack.model.generate(
        input_ids.to(pack.accelerator.device),
        attention_mask=attention_mask.to(pack.accelerator.device),
        generation_config=GenerationConfig(
            max_new_tokens=max(question.max_new_tokens for question in questions),
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=pad_token_id,
        ),
    )
    # Each answer ends where it would end alone, however long its neighbours may be.
    own = [row[width : width + question.max_new_tokens] for row, question in zip(output, questions, strict=True)]
    answers: list[str] = tokenizer.batch_decode(own, skip_special_tokens=True)
    return answers
