"""Tokenize a large data set on a Ray cluster, with Ray Data: one reader beside the file, tokenizers everywhere."""

import pickle
from collections.abc import Iterator
from typing import Any

import pyarrow
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from transformers.utils.logging import disable_progress_bar

from cluster.model_card import ModelCard
from cluster.models.base import load_tokenizer
from train_jobs.connection import connect
from train_jobs.formats import Format, format_named
from train_jobs.records import DataError
from train_jobs.token_block import TokenBlock, TokenRule, empty_block, record_blocks, tokenize_block

Batch = dict[str, Any]
COLUMN = "pickled"
"""One row is one block of records, then of tokens."""
READER_CPUS = 0.01
"""The reader waits for tokenizers nearly all the time."""


def blocks_from_cluster(source: str, format_: Format, card: ModelCard, rule: TokenRule) -> Iterator[TokenBlock]:
    """Yield the tokens of `source`, in its order whatever the size of the cluster.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    connect()
    num_free = int(ray.available_resources().get("CPU", 0))
    with DataContext.current(_context()):
        records = ray.data.from_items([source]).map_batches(
            _read,
            num_cpus=READER_CPUS,
            # Other machines may not see the file.
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
        blocks = records.map_batches(
            _Tokenizer,
            fn_constructor_args=(card, format_.name, rule),
            batch_size=1,
            compute=ActorPoolStrategy(size=max(1, num_free)),
            # Replicas that serve may hold all cores; then one tokenizer takes what they leave.
            num_cpus=1 - READER_CPUS if num_free else READER_CPUS,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        )
        for batch in blocks.iter_batches(batch_size=None, batch_format="pyarrow"):
            for pickled in batch[COLUMN]:
                yield pickle.loads(pickled.as_py())  # noqa: S301 (our own actors' work)


def _context() -> DataContext:
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # a row is a block: that is what is given out to tokenizers
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # ours says more
    context.print_on_execution_start = False
    return context


def _read(sources: Batch) -> Iterator[Batch]:
    (source,) = sources["item"]
    try:
        for records in record_blocks(source):
            yield _row(records)
    except DataError as error:  # an exception would come back as Ray's, with a traceback
        yield _row(str(error))


class _Tokenizer:
    """An actor of Ray Data."""

    def __init__(self, card: ModelCard, format_name: str, rule: TokenRule) -> None:
        disable_progress_bar()
        self._tokenizer = load_tokenizer(card)
        self._format = format_named(format_name)
        self._rule = rule

    def __call__(self, batch: Batch) -> Batch:
        records = pickle.loads(batch[COLUMN][0])  # noqa: S301 (from `_read`)
        if isinstance(records, str):
            return _row(empty_block(problem=records))
        return _row(tokenize_block(records, self._format, self._tokenizer, self._rule))


def _row(content: object) -> Batch:
    return {COLUMN: pyarrow.array([pickle.dumps(content)], type=pyarrow.binary())}
