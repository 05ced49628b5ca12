"""Write a `TokenStore` block by block; memory holds a few bytes per sample, never its tokens."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cluster.errors import UserError
from train_jobs.token_block import Int32, TokenBlock
from train_jobs.token_store import (
    EXAMPLES_FILE,
    FACTS_FILE,
    LENGTHS_FILE,
    TOKENS_FILE,
    TRAINED_FILE,
    StoreFacts,
)


class StoreNotWritable(UserError, OSError):
    """The tokens have no place."""


@dataclass(kw_only=True, slots=True)
class _Written:
    """What is known of the blocks so far."""

    lengths: list[Int32] = field(default_factory=list)
    trained_counts: list[Int32] = field(default_factory=list)
    examples: list[Int32] = field(default_factory=list)
    num_examples: int = 0
    num_cut: int = 0


def write_store(folder: Path, blocks: Iterable[TokenBlock], *, format_name: str) -> None:
    """Write `blocks` as the store `folder`, which is there whole or not at all.

    Raises:
        StoreNotWritable: There is no room for it.
    """
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        written = _Written()
        with (temporary / TOKENS_FILE).open("wb") as tokens:
            for block in blocks:
                tokens.write(block.tokens.tobytes())
                _note(written, block)
            _sync(tokens)
        _write_arrays(temporary, written)
        facts = StoreFacts(format=format_name, num_examples=written.num_examples, num_cut=written.num_cut)
        (temporary / FACTS_FILE).write_text(json.dumps(asdict(facts)))
        _publish(temporary, folder)
    except OSError as error:
        raise StoreNotWritable(
            f"Cannot write tokens to {folder.parent} ({error.strerror or error}); make room, or set KAJIYA_HOME to a "
            f"folder with more."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _note(written: _Written, block: TokenBlock) -> None:
    numbers = np.arange(len(block.samples_per_example), dtype=np.int32) + np.int32(written.num_examples)
    written.lengths.append(block.lengths)
    written.trained_counts.append(block.trained_counts)
    written.examples.append(np.repeat(numbers, block.samples_per_example))
    written.num_examples += len(numbers)
    written.num_cut += block.num_cut


def _write_arrays(folder: Path, written: _Written) -> None:
    arrays = {
        LENGTHS_FILE: written.lengths,
        TRAINED_FILE: written.trained_counts,
        EXAMPLES_FILE: written.examples,
    }
    for name, parts in arrays.items():
        with (folder / name).open("wb") as file:
            np.save(file, np.concatenate([np.empty(0, dtype=np.int32), *parts]))
            _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Somebody else was faster: the key says what is in it, so theirs is as good.
        if not (folder / FACTS_FILE).is_file():
            raise
