"""Samples on disk: read one by one, by index, so that a million of them take no more memory than ten.

A store is a folder that never changes. One int32 is a token: its id where it is trained, else the id's complement
(`~id`, below 0). S = samples, E = examples.
"""

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from train_jobs.tokens import IGNORED, Sample

TOKENS_FILE = "tokens.int32"
LENGTHS_FILE = "lengths.npy"
"""Tokens of each sample."""
TRAINED_FILE = "trained.npy"
"""Trained tokens of each sample."""
EXAMPLES_FILE = "examples.npy"
"""The example each sample comes from."""
FACTS_FILE = "store.json"
FILES = (TOKENS_FILE, LENGTHS_FILE, TRAINED_FILE, EXAMPLES_FILE, FACTS_FILE)
"""The last one is written last."""
TOKEN_BYTES = 4

Int32 = npt.NDArray[np.int32]
Fetch = Callable[[], Path]
"""Returns the store's folder on a machine that does not see the original."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFacts:
    """What is known of a store as a whole."""

    format: str
    num_examples: int
    num_cut: int
    """Samples that were longer than the limit."""


class TokenStore(Sequence[Sample]):
    """The samples of a store, or some of them. It is pickled as its place, not as its tokens."""

    def __init__(self, folder: Path, indices: Int32 | None = None, fetch: Fetch | None = None) -> None:
        """Open the store in `folder`, of which `indices` are meant, all by default; without a folder, `fetch` it."""
        if fetch is not None and not (folder / FACTS_FILE).is_file():
            folder = fetch()
        self.folder = folder
        self._indices = indices
        self._fetch = fetch
        self._file = os.open(folder / TOKENS_FILE, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        # Whoever holds this lock is safe from `prune`.
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self._indices, self._fetch)

    def __repr__(self) -> str:
        """Return a text that is the same for the same samples, on any machine."""
        chosen = "all" if self._indices is None else hashlib.sha256(self._indices.tobytes()).hexdigest()[:16]
        return f"TokenStore({self.folder.name}, {len(self)} samples, {chosen})"

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "TokenStore": ...

    def __getitem__(self, index: int | slice) -> "Sample | TokenStore":
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int32)[index])
        number = range(len(self))[index] if self._indices is None else int(self._indices[index])
        length = int(self._all_lengths[number])
        # Read, not mapped: pages of a mapping would count as the process's own memory.
        content = os.pread(self._file, length * TOKEN_BYTES, int(self._offsets[number]) * TOKEN_BYTES)
        tokens = np.frombuffer(content, dtype=np.int32)
        is_trained = tokens >= 0
        return Sample(
            input_ids=tuple(np.where(is_trained, tokens, ~tokens).tolist()),
            labels=tuple(np.where(is_trained, tokens, IGNORED).tolist()),
        )

    def take(self, indices: Int32) -> "TokenStore":
        """Return those of these samples, in the order of `indices`."""
        return TokenStore(self.folder, indices if self._indices is None else self._indices[indices], self._fetch)

    def carried_by(self, fetch: Fetch) -> "TokenStore":
        """Return the same samples for machines that do not see the folder."""
        return TokenStore(self.folder, self._indices, fetch)

    @cached_property
    def facts(self) -> StoreFacts:
        """Return what is known of the whole store."""
        return StoreFacts(**json.loads((self.folder / FACTS_FILE).read_text()))

    @cached_property
    def lengths(self) -> Int32:
        """Return the tokens of each sample."""
        return self._mine(self._all_lengths)

    @cached_property
    def trained_counts(self) -> Int32:
        """Return `num_trained_tokens` of each sample."""
        return self._mine(self._load(TRAINED_FILE))

    @cached_property
    def examples(self) -> Int32:
        """Return the number of the example each sample comes from."""
        return self._mine(self._load(EXAMPLES_FILE))

    @cached_property
    def _all_lengths(self) -> Int32:
        return self._load(LENGTHS_FILE)

    @cached_property
    def _offsets(self) -> npt.NDArray[np.int64]:
        ends = np.cumsum(self._all_lengths, dtype=np.int64)
        return ends - self._all_lengths

    def _load(self, name: str) -> Int32:
        loaded: Int32 = np.load(self.folder / name, mmap_mode="r")
        return loaded

    def _mine(self, values: Int32) -> Int32:
        return values if self._indices is None else values[self._indices]


def lengths_of(samples: Sequence[Sample]) -> Int32:
    """Return the tokens of each sample; of a store, without reading them."""
    if isinstance(samples, TokenStore):
        return samples.lengths
    return np.fromiter((len(sample.input_ids) for sample in samples), dtype=np.int32, count=len(samples))


def trained_counts_of(samples: Sequence[Sample]) -> Int32:
    """Return `num_trained_tokens` of each sample; of a store, without reading them."""
    if isinstance(samples, TokenStore):
        return samples.trained_counts
    return np.fromiter((sample.num_trained_tokens for sample in samples), dtype=np.int32, count=len(samples))
