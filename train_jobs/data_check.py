"""What a data set holds and what is wrong with it, before anything is trained on it."""

import hashlib
import statistics
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from train_jobs.data import check_records
from train_jobs.messages import Dialogue, Document, TrainOn
from train_jobs.records import DataError
from train_jobs.text_faults import FAULTS, JAPANESE
from train_jobs.tokens import IGNORED, Sample, whole_samples

NUM_PLACES = 3
"""Places that a finding names."""
NUM_PREVIEWS = 3
PROGRESS_RECORDS = 1000
"""Records between two words of progress."""
MAX_TOKENS_PER_CHARACTER = 1.5
"""Above it a tokenizer spells Japanese out in bytes: three of them are a character."""


@dataclass(kw_only=True, slots=True)
class Finding:
    """Something to look at, how often it is there, and where first."""

    name: str
    advice: str
    is_error: bool = False
    """Training refuses it."""
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.places) < NUM_PLACES:
            self.places.append(place)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Neighbouring tokens of a sample that are all trained or all not, as text."""

    text: str
    is_trained: bool


@dataclass(kw_only=True, slots=True)
class Report:
    """The whole data set."""

    format: str = ""
    num_records: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample, before any is cut."""
    num_japanese_characters: int = 0
    num_japanese_tokens: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    previews: list[list[Span]] = field(default_factory=list)

    @property
    def has_errors(self) -> bool:
        """Return whether training would refuse the data."""
        return not self.num_samples or any(finding.is_error for finding in self.findings.values())

    def note(self, place: str, name: str, advice: str, *, is_error: bool = False) -> None:
        """Count a finding at `place`."""
        self.findings.setdefault(name, Finding(name=name, advice=advice, is_error=is_error)).add(place)

    def quantiles(self) -> dict[str, int]:
        """Return lengths in tokens: shortest, median, 95% and longest."""
        if len(self.lengths) < 2:
            return dict.fromkeys(("shortest", "median", "95%", "longest"), sum(self.lengths))
        cuts = statistics.quantiles(self.lengths, n=20, method="inclusive")
        return {
            "shortest": min(self.lengths),
            "median": round(statistics.median(self.lengths)),
            "95%": round(cuts[-1]),
            "longest": max(self.lengths),
        }


def check_data(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stop_token_ids: Sequence[int] = (),
    train_on: TrainOn = "all",
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Return what is in `source` and what is wrong with it, for a model with this tokenizer.

    `on_progress` is told the number of records that were read, every now and then.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    report = Report()
    examples = _examples(report, source, tokenizer, on_progress)
    for example, found in whole_samples(
        examples, tokenizer, max_length=max_length, stop_token_ids=stop_token_ids, train_on=train_on
    ):
        if isinstance(found, DataError):
            report.note(str(found), "examples the model's template refuses", "correct them", is_error=True)
            continue
        for sample in found:
            _check_sample(report, sample, example.where, max_length, tokenizer)
    _check_tokenizer(report)
    return report


def _examples(
    report: Report, source: str | Path, tokenizer: PreTrainedTokenizerBase, on_progress: Callable[[int], None] | None
) -> Iterator[Dialogue | Document]:
    """Yield the examples of `source` and note what can be told without the model's template."""
    seen: dict[bytes, str] = {}
    for checked in check_records(source):
        report.num_records += 1
        if on_progress is not None and report.num_records % PROGRESS_RECORDS == 0:
            on_progress(report.num_records)
        example = checked.example
        if example is None:
            report.note(checked.problem or "", "records that cannot be read", "correct or remove them", is_error=True)
            continue
        report.format = checked.format or report.format
        _check_texts(report, example, tokenizer)
        _check_repeats(report, example, seen, source=str(source))
        yield example


def texts_of(example: Dialogue | Document) -> list[str]:
    """Return every text of `example`."""
    return [example.text] if isinstance(example, Document) else [message.content for message in example.messages]


def _check_texts(report: Report, example: Dialogue | Document, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = texts_of(example)
    for fault in FAULTS:
        if any(fault.is_in(text) for text in texts):
            report.note(example.where, fault.name, fault.advice)
    for text in filter(JAPANESE.search, texts):
        report.num_japanese_characters += len(text)
        report.num_japanese_tokens += len(tokenizer(text, add_special_tokens=False).input_ids)


def _check_repeats(report: Report, example: Dialogue | Document, seen: dict[bytes, str], *, source: str) -> None:
    # Width, case and blanks apart: what differs in nothing else teaches the same.
    key = " ".join(unicodedata.normalize("NFKC", "\n".join(texts_of(example))).casefold().split())
    # A million texts would fill the memory; their hashes and places do not.
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    place = example.where.removeprefix(source)
    first = seen.setdefault(digest, place)
    if first is not place:
        report.note(
            f"{example.where} (as {source}{first})",
            "repeats",
            "repeated examples weigh more; remove what is not meant",
        )


def _check_sample(
    report: Report, sample: Sample, where: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    cut = sample.first(max_length)
    report.num_samples += 1
    report.lengths.append(len(sample.input_ids))
    report.num_tokens += len(cut.input_ids)
    report.num_trained_tokens += cut.num_trained_tokens
    if not cut.num_trained_tokens:
        advice = f"their answers lie behind max_length={max_length}; raise it or shorten them"
        report.note(where, "samples without a trained token", advice, is_error=True)
    elif len(sample.input_ids) > max_length:
        inside = " (inside an answer)" if sample.labels[max_length] != IGNORED else ""
        report.note(f"{where}{inside}", "samples that are cut", f"they are longer than max_length={max_length}")
    if len(report.previews) < NUM_PREVIEWS:
        report.previews.append(list(spans(cut, tokenizer)))


def spans(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """Yield `sample` as text, cut where training begins and ends."""
    begin = 0
    for end in range(1, len(sample.input_ids) + 1):
        is_trained = sample.labels[begin] != IGNORED
        if end == len(sample.input_ids) or (sample.labels[end] != IGNORED) != is_trained:
            yield Span(text=str(tokenizer.decode(list(sample.input_ids[begin:end]))), is_trained=is_trained)
            begin = end


def _check_tokenizer(report: Report) -> None:
    if report.num_japanese_tokens > MAX_TOKENS_PER_CHARACTER * report.num_japanese_characters:
        ratio = report.num_japanese_tokens / report.num_japanese_characters
        report.note(
            f"{ratio:.1f} tokens per character",
            "a tokenizer that spells Japanese out in bytes",
            "answers are long and slow; a model made for Japanese needs about a third of the tokens",
        )
