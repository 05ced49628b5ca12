"""All samples of a file, in memory or in a store."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from train_jobs.messages import Dialogue, Document, TrainOn
from train_jobs.token_store import lengths_of, trained_counts_of
from train_jobs.tokens import Sample, cut_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedData:
    """All samples of a file, and how many had to be cut."""

    samples: Sequence[Sample]
    num_cut: int
    """Samples longer than the limit; they keep their beginning."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all samples."""
        return int(lengths_of(self.samples).sum(dtype="int64"))

    @property
    def num_trained_tokens(self) -> int:
        """Return the tokens of all samples that contribute to the loss."""
        return int(trained_counts_of(self.samples).sum(dtype="int64"))

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample."""
        return int(lengths_of(self.samples).max())


def tokenize(
    examples: Iterable[Dialogue | Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
) -> TokenizedData:
    """Return the samples of `examples`.

    Of a dialogue the assistant's turns are trained, up to and with their end-of-turn token; one of more than
    `max_length` tokens keeps its first `max_length`. A text is trained whole, in pieces of `max_length`.

    Raises:
        DataError: The template refuses a dialogue, its answers cannot be told from their prompts, or nothing
            trainable is left of a sample.
    """
    samples: list[Sample] = []
    num_cut = 0
    for found, num_longer in cut_samples(
        examples, tokenizer, max_length=max_length, stop_token_ids=stop_token_ids, train_on=train_on
    ):
        samples += found
        num_cut += num_longer
    return TokenizedData(samples=tuple(samples), num_cut=num_cut)
