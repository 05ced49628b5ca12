"""What an evaluation found."""

from collections.abc import Sequence
from dataclasses import dataclass

from train_jobs.job import Question


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One question and what was answered."""

    question: str
    expected: str
    """What the answer has to be, or to contain."""
    answer: str
    is_right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How a model does on a file."""

    model: str
    """As it is served: `model`, or `model:adapter@version`."""
    precision: str | None
    """Of the base; None through an endpoint, which does not tell it."""
    data: str
    data_sha256: str
    num_samples: int
    loss: float | None
    """Mean over all trained tokens; None through an endpoint, which does not tell the loss of a given text."""
    answers: tuple[Answered, ...]

    @property
    def num_right(self) -> int:
        """Return how many answers are right."""
        return sum(answered.is_right for answered in self.answers)

    @property
    def exact_match(self) -> float | None:
        """Return the share of right answers; None where there was nothing to ask."""
        return self.num_right / len(self.answers) if self.answers else None


def answered(questions: Sequence[Question], answers: Sequence[str]) -> tuple[Answered, ...]:
    """Return each question with its answer."""
    return tuple(
        Answered(question=q.text, expected=q.expected, answer=answer.strip(), is_right=q.is_right(answer))
        for q, answer in zip(questions, answers, strict=True)
    )
