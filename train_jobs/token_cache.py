"""Data sets are tokenized once: `KAJIYA_HOME/tokens/KEY` serves later runs, and every trial of a search."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cluster.home import make_home_folder
from cluster.model_card import ModelCard
from cluster.models.base import load_tokenizer
from train_jobs.data import format_in
from train_jobs.progress import announce
from train_jobs.records import HUB_PREFIX, DataError, source_bytes
from train_jobs.token_block import TokenBlock, TokenRule, record_blocks, tokenize_block
from train_jobs.token_store import FACTS_FILE, TOKENS_FILE, TokenStore
from train_jobs.token_writer import write_store

LAYOUT = 1
"""Of a store's files and of what is in them; another one makes all stores anew."""
LARGE_BYTES = 2**24
"""From here on tokenizing takes longer than to start a pool of actors, about ten seconds."""
MAX_IDLE_S = 30 * 24 * 3600
"""A store that nobody has used for so long goes."""
MAX_CACHE_BYTES = 50 * 2**30
"""If all stores are larger, the one whose last use is the longest ago goes first."""
MAX_WRITING_S = 24 * 3600
"""No file in a folder that is being written is begun so late."""
PROGRESS_S = 5.0


def tokens_folder() -> Path:
    """Return where stores lie, made if it is not there."""
    return make_home_folder("tokens")


def token_store(source: str, sha256: str, card: ModelCard, rule: TokenRule) -> TokenStore:
    """Return the tokens of `source`, whose hash is `sha256`: those of an earlier run, or new ones.

    Raises:
        DataError: A record cannot be trained on; file, line and reason are named.
        StoreNotWritable: There is no room for them.
    """
    tokenizer = load_tokenizer(card)
    folder = tokens_folder() / store_key(source, sha256, tokenizer, rule)
    if (folder / FACTS_FILE).is_file():
        os.utime(folder / FACTS_FILE)
        announce("tokens", f"{source}: the tokens of an earlier run are used", path=str(folder))
    else:
        format_ = format_in(source)
        if source_bytes(source) >= LARGE_BYTES:
            from train_jobs.token_cluster import blocks_from_cluster

            blocks: Iterator[TokenBlock] = blocks_from_cluster(source, format_, card, rule)
        else:
            blocks = (tokenize_block(records, format_, tokenizer, rule) for records in record_blocks(source))
        write_store(folder, _watched(blocks, source), format_name=format_.name)
    store = TokenStore(folder)
    prune()
    return store


def store_key(source: str, sha256: str, tokenizer: PreTrainedTokenizerBase, rule: TokenRule) -> str:
    """Return a name that differs whenever the tokens could."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = {
        "layout": LAYOUT,
        "data": sha256,
        # The same bytes are read in another way under another suffix.
        "kind": HUB_PREFIX if source.startswith(HUB_PREFIX) else Path(source).suffix.lower(),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "rule": asdict(rule),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _watched(blocks: Iterator[TokenBlock], source: str) -> Iterator[TokenBlock]:
    """Yield `blocks`, say how far they are, and stop at the first problem."""
    begin_s = said_s = time.monotonic()
    num_examples = num_tokens = 0
    for block in blocks:
        if block.problem is not None:
            raise DataError(block.problem)
        num_examples += len(block.samples_per_example)
        num_tokens += len(block.tokens)
        yield block
        now_s = time.monotonic()
        if now_s - said_s >= PROGRESS_S:
            said_s = now_s
            rate = num_tokens / (now_s - begin_s)
            announce(
                "tokenizing",
                f"tokenizing {source}: {num_examples} examples, {num_tokens} tokens, {rate:.0f} tokens/s",
                num_examples=num_examples,
                num_tokens=num_tokens,
            )


def prune() -> None:
    """Remove stores that were idle for `MAX_IDLE_S`, and the longest idle above `MAX_CACHE_BYTES`; none in use.

    Of those that a dead run left half-written, nothing is left after a day.
    """
    for folder in tokens_folder().glob(".*-*/"):
        if time.time() - folder.stat().st_mtime > MAX_WRITING_S:
            shutil.rmtree(folder, ignore_errors=True)
    stores = [folder for folder in tokens_folder().iterdir() if (folder / FACTS_FILE).is_file()]
    used_s = {folder: (folder / FACTS_FILE).stat().st_mtime for folder in stores}
    sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in stores}
    total = sum(sizes.values())
    for folder in sorted(stores, key=used_s.__getitem__):
        is_idle = time.time() - used_s[folder] > MAX_IDLE_S
        if (is_idle or total > MAX_CACHE_BYTES) and _remove_unused(folder):
            total -= sizes[folder]


def _remove_unused(folder: Path) -> bool:
    with (folder / TOKENS_FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a `TokenStore` is open
        except BlockingIOError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True
