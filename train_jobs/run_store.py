"""Where a run keeps what it must not lose: a folder on a disk, or below any URI that `pyarrow.fs` opens.

<root>/<run>/record.json                 what was asked for, and what the run is made of
<root>/<run>/checkpoints/s00000012/      weights and optimizer after step 12; there all or not at all
<root>/<run>/result/                     the trained adapters and the outcome; registered, then the run is deleted

Ray Train's own checkpoint manager is not used: it overwrites its list of checkpoints in place, so a kill at the wrong
moment makes all of them unreadable, and a full disk ends the run from within the controller.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pyarrow import ArrowException

from cluster.errors import UserError
from cluster.home import kajiya_home, make_home_folder
from cluster.store import FolderStore

RECORD_FILE = "record.json"
RUN_PATTERN = re.compile(r"(?P<name>.+)-\d{8}-\d{6}-[0-9a-f]{6}")
CHECKPOINT_PATTERN = re.compile(r"s(\d{8})")


class UnknownRun(UserError, LookupError):
    """There is no such run to go on with."""


class StorageUnusable(UserError, OSError):
    """Runs cannot be kept where the user wants them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStore:
    """One run below `root`; small enough to be sent to every worker."""

    root: str
    run: str
    """NAME-DATE-TIME-RANDOM: unique, and sorted by time among the runs of an adapter."""

    @property
    def _store(self) -> FolderStore:
        return _open(self.root)

    @property
    def uri(self) -> str:
        """Return where the run lies, for messages."""
        return f"{self.root.rstrip('/')}/{self.run}"

    def write_record(self, content: bytes) -> None:
        """Keep what the run is; raises `StorageUnusable`."""
        try:
            self._store.write_private(f"{self.run}/{RECORD_FILE}", content)
        except OSError as error:
            raise StorageUnusable(f"Cannot keep a run in {self.root} ({error.strerror or error}).") from error

    def read_record(self) -> bytes:
        """Return what `write_record` kept; raises `FileNotFoundError`."""
        return self._store.read(f"{self.run}/{RECORD_FILE}")

    def is_visible(self) -> bool:
        """Return whether this machine sees the run."""
        return self._store.exists(f"{self.run}/{RECORD_FILE}")

    def steps(self) -> list[int]:
        """Return the steps after which there is a whole checkpoint, ascending."""
        names = self._store.folders_with(RECORD_FILE, f"{self.run}/checkpoints")
        return sorted(int(found[1]) for name in names if (found := CHECKPOINT_PATTERN.fullmatch(name)))

    def save(self, step: int, folder: Path, record: bytes) -> None:
        """Keep `folder` as the checkpoint of `step`; `record` is written last. Raises `OSError`."""
        path = f"{self.run}/checkpoints/s{step:08d}"
        if not self._store.publish(folder, path, (RECORD_FILE, record)):
            self._store.delete(path)  # it was there and unreadable, or the run would have gone on behind it
            self._store.publish(folder, path, (RECORD_FILE, record))

    def checkpoint(self, step: int, cache: Path) -> Path:
        """Return a local folder with the checkpoint of `step`: its own, or a copy below `cache`."""
        return self._store.fetch(f"{self.run}/checkpoints/s{step:08d}", cache / f"s{step:08d}")

    def read_checkpoint_record(self, step: int) -> bytes:
        """Return the record of the checkpoint of `step`; raises `FileNotFoundError`."""
        return self._store.read(f"{self.run}/checkpoints/s{step:08d}/{RECORD_FILE}")

    def prune(self, kept_steps: Collection[int]) -> None:
        """Delete all checkpoints but those of `kept_steps`."""
        for step in set(self.steps()) - set(kept_steps):
            self._store.delete(f"{self.run}/checkpoints/s{step:08d}")

    def save_result(self, folder: Path, record: bytes) -> None:
        """Keep what the run made; raises `OSError`."""
        self._store.publish(folder, f"{self.run}/result", (RECORD_FILE, record))

    def read_result(self) -> bytes | None:
        """Return the record of the result, or None before the run has ended."""
        try:
            return self._store.read(f"{self.run}/result/{RECORD_FILE}")
        except FileNotFoundError:
            return None

    def result(self, cache: Path) -> Path:
        """Return a local folder with what the run made."""
        return self._store.fetch(f"{self.run}/result", cache / "result")

    def delete_result(self) -> None:
        """Let the run go on from its last checkpoint."""
        self._store.delete(f"{self.run}/result")

    def delete(self) -> None:
        """Delete the run with everything in it, if there is anything."""
        with contextlib.suppress(OSError):
            self._store.delete(self.run)


def new_run(name: str, storage: str | None) -> RunStore:
    """Return an empty run below `storage`, or in the folder `runs` of `KAJIYA_HOME`; nothing is written yet.

    Raises:
        HomeNotWritable: The folder cannot be made.
        StorageUnusable: `storage` cannot be opened.
    """
    root = _root(storage) if storage else str(make_home_folder("runs"))
    return RunStore(root=root, run=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")


def find_run(wanted: str, storage: str | None) -> RunStore:
    """Return the run that is called `wanted`, or the latest one of the adapter `wanted`.

    Raises:
        UnknownRun: There is none; the message names those there are.
        StorageUnusable: `storage` cannot be opened.
    """
    root = _root(storage) if storage else str(kajiya_home() / "runs")
    runs = _open(root).folders_with(RECORD_FILE)
    fitting = [run for run in runs if run == wanted or _adapter_of(run) == wanted]
    if not fitting:
        raise UnknownRun(f"There is no run {wanted!r} in {root} to go on with; there are {', '.join(runs) or 'none'}.")
    return RunStore(root=root, run=fitting[-1])


def _root(storage: str) -> str:
    # Workers have other working folders than the driver.
    root = storage if "://" in storage else str(Path(storage).expanduser().absolute())
    try:
        _open(root).folders()
    except (OSError, ValueError, ArrowException) as error:
        raise StorageUnusable(f"Cannot keep runs in {storage} ({error}); use a folder, or a URI as s3://….") from error
    return root


@cache
def _open(root: str) -> FolderStore:
    return FolderStore(root)


def _adapter_of(run: str) -> str | None:
    found = RUN_PATTERN.fullmatch(run)
    return found["name"] if found else None
