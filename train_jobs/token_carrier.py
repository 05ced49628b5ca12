"""Bring a `TokenStore` to machines that do not see its folder: once each, and only when they ask for it."""

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from filelock import FileLock

from cluster.home import make_home_folder
from train_jobs.job import TrainJob
from train_jobs.token_store import FACTS_FILE, FILES, TokenStore
from train_jobs.tokens import Sample

CHUNK_BYTES = 2**26
"""What passes through the object store at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FromNode:
    """Copies a store from the node that made it."""

    node_id: str
    folder: Path
    """On that node."""

    def __call__(self) -> Path:
        """Return the folder of the copy, made if this machine has none."""
        local = make_home_folder("tokens") / self.folder.name
        with FileLock(local.with_name(f".{local.name}.lock")):  # all workers of a machine ask at once
            if not (local / FACTS_FILE).is_file():
                self._copy(local)
        return local

    def _copy(self, local: Path) -> None:
        temporary = local.with_name(f".{local.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            for name in FILES:
                with (temporary / name).open("wb") as file:
                    while chunk := self._read(name, file.tell()):
                        file.write(chunk)
            temporary.rename(local)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read(self, name: str, offset: int) -> bytes:
        there = ray.remote(_read).options(num_cpus=0, label_selector={"ray.io/node-id": self.node_id})
        chunk: bytes = ray.get(there.remote(self.folder / name, offset))
        return chunk


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), CHUNK_BYTES, offset)


def carried(job: TrainJob) -> TrainJob:
    """Return `job` so that its samples can be read on every node of the cluster; needs a driver of Ray's."""
    return replace(job, samples=_carried(job.samples), held_out=_carried(job.held_out))


def _carried(samples: Sequence[Sample]) -> Sequence[Sample]:
    if not isinstance(samples, TokenStore):
        return samples
    node_id = ray.get_runtime_context().get_node_id()
    return samples.carried_by(FromNode(node_id=node_id, folder=samples.folder))
