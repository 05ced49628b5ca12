"""The shipped data set, tokenized for a peer as our own jobs tokenize it."""

import json
from pathlib import Path

from benchmarks.adapter_files import MODEL
from cluster.catalog import find
from cluster.models.base import load_tokenizer
from train_jobs.data import read_data_file
from train_jobs.tokens import whole_samples

FILES = {"train": "train.jsonl", "held_out": "heldout.jsonl"}


def write_samples(data: Path, folder: Path) -> Path:
    """Write the samples of both parts as JSON into `folder` and return the file."""
    card = find(MODEL)
    tokenizer = load_tokenizer(card)
    parts = {}
    for part, name in FILES.items():
        found = whole_samples(
            read_data_file(str(data / name)).examples,
            tokenizer,
            max_length=card.max_position_embeddings,
            stop_token_ids=card.stop_token_ids,
            train_on="all",
        )
        samples = [sample for _, several in found if isinstance(several, list) for sample in several]
        parts[part] = [{"input_ids": list(s.input_ids), "labels": list(s.labels)} for s in samples]
    path = folder / "samples.json"
    path.write_text(json.dumps(parts))
    return path
