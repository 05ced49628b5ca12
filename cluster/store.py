"""Folders below one root, on a local disk or on any store that `pyarrow.fs` opens, written all or not at all."""

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Hashable
from pathlib import Path

from pyarrow import fs

REMOTE_STAMP_S = 1.0
"""How long what was read from an object store counts as unchanged; asking would take as long as reading."""


class FolderStore:
    """Named folders of files under `root`: a local folder or a URI such as `s3://bucket/adapters`.

    Paths are relative to the root, with `/`. Folders whose name starts with `.` are unfinished and never listed.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if "://" in self.root:
            self._fs, self._base = fs.FileSystem.from_uri(self.root)
        else:
            self._fs, self._base = fs.LocalFileSystem(), str(Path(self.root).expanduser().absolute())
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    def uri(self, path: str) -> str:
        """Return where `path` lies in the store."""
        return f"{self._base}/{path}"

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the finished folders in `path`, sorted; none where `path` does not exist."""
        infos = self._list(path)
        return sorted(i.base_name for i in infos if i.type == fs.FileType.Directory and not i.base_name.startswith("."))

    def files(self, path: str = "") -> dict[str, tuple[int, int]]:
        """Return the files in the folder `path` by name: time of the last change in ns, and size in bytes."""
        return {i.base_name: (i.mtime_ns or 0, i.size) for i in self._list(path) if i.type == fs.FileType.File}

    def exists(self, path: str) -> bool:
        """Return whether there is a file or folder at `path`."""
        return bool(self._fs.get_file_info(self.uri(path)).type != fs.FileType.NotFound)

    def folders_with(self, file: str, path: str = "") -> list[str]:
        """Return the names of the finished folders in `path` that hold `file`, sorted."""
        if self._is_local:
            names = self.folders(path)
            infos = self._fs.get_file_info([self.uri(f"{path}/{name}/{file}") for name in names])
            return [name for name, info in zip(names, infos, strict=True) if info.type == fs.FileType.File]
        # One listing of all there is below takes a request per thousand files; asking for each file takes one each.
        depth = self.uri(path).strip("/").count("/") + 2
        paths = [i.path.strip("/") for i in self._list(path, recursive=True) if i.base_name == file]
        names = [p.split("/")[-2] for p in paths if p.count("/") == depth]
        return sorted(name for name in names if not name.startswith("."))

    def _list(self, path: str, *, recursive: bool = False) -> list[fs.FileInfo]:
        """Return what lies in the folder `path`; nothing where there is no such folder."""
        selector = fs.FileSelector(self.uri(path).rstrip("/"), recursive=recursive, allow_not_found=True)
        try:
            return list(self._fs.get_file_info(selector))
        except FileNotFoundError:
            # A disk is asked whether the folder exists after it could not be listed; one made between the two is an
            # error in spite of `allow_not_found`.
            return []

    def stamp(self, path: str) -> Hashable | None:
        """Return what changes with the file at `path`, at the latest after `REMOTE_STAMP_S`; None without a file."""
        if not self._is_local:
            return int(time.monotonic() / REMOTE_STAMP_S)
        try:
            status = Path(self.uri(path)).stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ino, status.st_size)

    def read(self, path: str) -> bytes:
        """Return the content of the file at `path`; raises `FileNotFoundError`."""
        with self._fs.open_input_stream(self.uri(path)) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        """Replace the file at `path` in one step."""
        # An object store replaces a whole object at once; a disk does after a rename.
        target = f"{path}.{uuid.uuid4().hex}" if self._is_local else path
        try:
            with self._fs.open_output_stream(self.uri(target)) as stream:
                stream.write(content)
            if self._is_local:
                Path(self.uri(target)).replace(self.uri(path))
        finally:
            if self._is_local:  # still there after a full disk
                Path(self.uri(target)).unlink(missing_ok=True)

    def write_private(self, path: str, content: bytes) -> None:
        """Replace the file at `path` in one step, its folder made if need be; on a disk, only its owner may read it."""
        if not self._is_local:
            self._fs.create_dir(self.uri(path).rpartition("/")[0], recursive=True)
            self.write(path, content)
            return
        target = Path(self.uri(path))
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = target.with_name(f".{uuid.uuid4().hex}")
        with open(staging, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(content)
        staging.replace(target)

    def publish(self, folder: Path, path: str, last_file: tuple[str, bytes]) -> bool:
        """Copy `folder` to the new folder `path`; return False if `path` exists already.

        `last_file` (name, content) is written last: on a store without renames, its presence is what makes the
        folder whole. On a disk nothing is seen at `path` before all of it is there.
        """
        if self.exists(f"{path}/{last_file[0]}"):
            return False
        parent = path.rpartition("/")[0]
        target = f"{parent}/.{uuid.uuid4().hex}" if self._is_local else path
        self._fs.create_dir(self.uri(target), recursive=True)
        local = fs.LocalFileSystem()
        try:
            fs.copy_files(str(folder), self.uri(target), source_filesystem=local, destination_filesystem=self._fs)
            self.write(f"{target}/{last_file[0]}", last_file[1])
            return not self._is_local or _rename(Path(self.uri(target)), Path(self.uri(path)))
        finally:
            if self._is_local:
                shutil.rmtree(self.uri(target), ignore_errors=True)

    def delete(self, path: str) -> None:
        """Delete the folder at `path`; it vanishes from listings before its files do."""
        target = path
        if self._is_local:
            parent = path.rpartition("/")[0]
            target = f"{parent}/.{uuid.uuid4().hex}".lstrip("/")
            Path(self.uri(path)).rename(self.uri(target))
        self._fs.delete_dir(self.uri(target))

    def fetch(self, path: str, cache: Path) -> Path:
        """Return a local folder with the files of `path`: the folder itself on a disk, else a copy at `cache`."""
        if self._is_local:
            return Path(self.uri(path))
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache.parent) as staging:
                copy = Path(staging) / "copy"
                copy.mkdir()
                local = fs.LocalFileSystem()
                fs.copy_files(self.uri(path), str(copy), source_filesystem=self._fs, destination_filesystem=local)
                _rename(copy, cache)
        return cache


def _rename(source: Path, target: Path) -> bool:
    """Rename a folder; return False where another process was first."""
    with contextlib.suppress(OSError):
        source.rename(target)
        return True
    if target.exists():
        return False
    source.rename(target)  # not a race: let the reason be seen
    return True
