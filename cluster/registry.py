"""The adapter registry: immutable versions in folders, an alias per adapter, no database to run.

<root>/<model>/<name>/alias.json               which version `model:name` means, for whom, and those before it
<root>/<model>/<name>/v3/manifest.json         where the version came from, and the hash of each of its files
<root>/<model>/<name>/v3/adapter_config.json   PEFT's own files
<root>/<model>/<name>/v3/adapter_model.safetensors
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cluster.alias import Alias
from cluster.errors import UserError
from cluster.home import kajiya_home
from cluster.manifest import Manifest
from cluster.store import FolderStore

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MANIFEST_FILE = "manifest.json"
ALIAS_FILE = "alias.json"


class UnknownAdapter(UserError, LookupError):
    """No such adapter or version is registered."""


class BrokenAdapter(UserError, ValueError):
    """A registered version whose files are missing, changed or unreadable."""


class InvalidAdapterName(UserError, ValueError):
    """A name that cannot stand between the `:` and the `@` of a served name."""


class AdapterInUse(UserError, ValueError):
    """The version cannot be deleted while its alias points at it."""


class RegistryUnwritable(UserError, OSError):
    """The registry's store does not take what is written to it."""


class AdapterNotFetched(UserError, OSError):
    """The files of a version cannot be brought to this machine; it may help to free space and to ask again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter, as its manifest states it."""

    model: str
    """Catalog name of the base."""
    name: str
    """Name of the adapter, without version."""
    version: int
    """Counts from 1."""
    uri: str
    """Folder of the version in the registry's store."""
    manifest: Manifest

    @property
    def served_name(self) -> str:
        """The name that asks for exactly this version: `model:name@version`."""
        return f"{self.model}:{self.name}@{self.version}"


class Registry:
    """Adapters below one root: a local folder, or a URI that `pyarrow.fs` opens (`s3://bucket/adapters`)."""

    def __init__(self, root: str | Path) -> None:
        self._store = FolderStore(root)

    @classmethod
    def default(cls) -> "Registry":
        """Return the registry at `KAJIYA_REGISTRY`, or in the folder `adapters` of `KAJIYA_HOME`."""
        return cls(os.environ.get("KAJIYA_REGISTRY") or kajiya_home() / "adapters")

    def add(self, folder: Path, manifest: Manifest, *, promote: bool = True) -> AdapterVersion:
        """Copy `folder` into a new version, numbered after the last, and return it.

        `promote` points the adapter's alias at it, which the first version has in any case. A crash leaves nothing
        that can be read as a version.

        Raises:
            InvalidAdapterName: the manifest's name cannot be served.
            RegistryUnwritable: the message says where the adapter still is.
        """
        check_name(manifest.name)
        hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        home = f"{manifest.model}/{manifest.name}"
        try:
            number = self._last_number(manifest.model, manifest.name)
            while True:
                number += 1
                numbered = manifest.model_copy(update={"version": number, "files": hashes})
                content = numbered.model_dump_json(indent=2).encode()
                if self._store.publish(folder, f"{home}/v{number}", (MANIFEST_FILE, content)):
                    break
        except OSError as error:
            raise RegistryUnwritable(f"{self._unwritable(error)} The adapter is still in {folder}.") from error
        if promote or number == 1:
            self.promote(manifest.model, manifest.name, number)
        return self._read(manifest.model, manifest.name, number)

    def list(self, model: str | None = None) -> tuple[AdapterVersion, ...]:
        """Return every version, by model, name and number."""
        return tuple(
            self._read(base, name, number)
            for base in ([model] if model else self._store.folders())
            for name in self._store.folders(base)
            for number in self.versions(base, name)
        )

    def names(self, model: str) -> tuple[str, ...]:
        """Return the adapters of `model` that an alias makes servable, sorted; reads no manifest."""
        return tuple(self._store.folders_with(ALIAS_FILE, model))

    def versions(self, model: str, name: str) -> tuple[int, ...]:
        """Return the numbers of the versions of `model:name`, ascending."""
        folders = [f for f in self._store.folders(f"{model}/{name}") if re.fullmatch(r"v\d+", f)]
        whole = [f for f in folders if self._store.exists(f"{model}/{name}/{f}/{MANIFEST_FILE}")]
        return tuple(sorted(int(f[1:]) for f in whole))

    def resolve(self, model: str, ref: str) -> AdapterVersion:
        """Return the version that `ref` means: `name` follows the alias, `name@3` is version 3.

        Raises:
            UnknownAdapter: no such adapter or version; the message names those there are.
            BrokenAdapter: the alias or the manifest is unreadable.
        """
        name, _, number = ref.partition("@")
        numbers = self.versions(model, name) if NAME_PATTERN.fullmatch(name) else ()
        if not numbers:
            known = ", ".join(self.names(model)) or "none"
            raise UnknownAdapter(f"{model} has no adapter {name!r}; registered: {known}.")
        wanted = number or str(self.alias(model, name).version)
        if wanted not in map(str, numbers):
            known = ", ".join(f"{name}@{n}" for n in numbers)
            raise UnknownAdapter(f"{model}:{name} has no version {wanted!r}; there are {known}.")
        return self._read(model, name, int(wanted))

    def alias(self, model: str, name: str) -> Alias:
        """Return what `model:name` means."""
        path = f"{model}/{name}/{ALIAS_FILE}"
        try:
            return Alias.model_validate_json(self._store.read(path))
        except FileNotFoundError:
            raise UnknownAdapter(f"{model}:{name} points at no version; promote one of its versions.") from None
        except ValidationError as error:
            raise BrokenAdapter(f"{self._store.uri(path)} is broken: {_first_problem(error)}.") from error

    def stamp(self, model: str, name: str) -> Hashable | None:
        """Return what changes, within a second, whenever what `model:name` means or one of its versions does.

        None where there is nothing that may be kept: no such adapter.
        """
        return self._store.stamp(f"{model}/{name}/{ALIAS_FILE}") if NAME_PATTERN.fullmatch(name) else None

    def point(self, model: str, name: str, alias: Alias) -> Alias:
        """Make `alias` what `model:name` means, and return it; raises `RegistryUnwritable`."""
        try:
            self._store.write(f"{model}/{name}/{ALIAS_FILE}", alias.model_dump_json().encode())
        except OSError as error:
            raise RegistryUnwritable(self._unwritable(error)) from error
        return alias

    def promote(self, model: str, name: str, version: int) -> Alias:
        """Point `model:name` at `version` for everybody; what it meant before is kept for `rollback`."""
        self.resolve(model, f"{name}@{version}")
        try:
            alias = self.alias(model, name)
        except UnknownAdapter:
            return self.point(model, name, Alias(version=version))
        return self.point(model, name, alias.promoted(version))

    def rollback(self, model: str, name: str) -> Alias:
        """End the canary of `model:name`; without one, point it at what it meant before the last promotion."""
        self.resolve(model, name)
        alias = self.alias(model, name)
        before = alias.rolled_back()
        if before is None:
            raise UnknownAdapter(f"{model}:{name} meant no version before {alias.version}; nothing to roll back to.")
        return self.point(model, name, before)

    def remove(self, model: str, ref: str) -> None:
        """Delete one version (`name@3`), or the adapter with all its versions (`name`).

        Requests that run through it are not touched: a replica has what it needs in memory.

        Raises:
            UnknownAdapter: no such adapter or version.
            AdapterInUse: the alias points at that version, for everybody or for some.
        """
        name, _, number = ref.partition("@")
        found = self.resolve(model, ref)
        if not number:
            self._store.delete(f"{model}/{name}")
            return
        alias = self.alias(model, name)
        if alias.version == found.version:
            raise AdapterInUse(f"{model}:{name} points at version {number}; promote another version first.")
        if alias.canary is not None and alias.canary.version == found.version:
            raise AdapterInUse(f"{model}:{name} tries version {number}; promote it or roll back first.")
        last_version = self._last_number(model, name)
        self.point(model, name, alias.without(found.version, last_version=last_version))
        self._store.delete(f"{model}/{name}/v{number}")

    def fetch(self, version: AdapterVersion) -> Path:
        """Return a local folder with the files of `version`, each checked against the manifest.

        Raises:
            AdapterNotFetched: the store or the disk here fails; nothing half-copied stays.
            BrokenAdapter: a file is missing, or is not the one that was registered.
        """
        path = f"{version.model}/{version.name}/v{version.version}"
        content = hashlib.sha256(repr(sorted(version.manifest.files.items())).encode()).hexdigest()[:16]
        try:
            # By content too: a name that was deleted and given again has another one.
            folder = self._store.fetch(path, kajiya_home() / "fetched" / f"{path}-{content}")
        except OSError as error:
            reason = error.strerror or str(error)
            raise AdapterNotFetched(f"{version.served_name} cannot be brought here ({reason}); try again.") from error
        for file, expected in version.manifest.files.items():
            if not (folder / file).is_file():
                problem = f"{file} is missing"
            elif _sha256(folder / file) != expected:
                problem = f"{file} is not the file that was registered"
            else:
                continue
            raise BrokenAdapter(f"{version.served_name} is broken: {problem} in {folder}; roll back or train again.")
        return folder

    def _read(self, model: str, name: str, number: int) -> AdapterVersion:
        path = f"{model}/{name}/v{number}"
        try:
            manifest = Manifest.model_validate_json(self._store.read(f"{path}/{MANIFEST_FILE}"))
        except ValidationError as error:
            where = self._store.uri(f"{path}/{MANIFEST_FILE}")
            raise BrokenAdapter(f"{where} is broken: {_first_problem(error)}.") from error
        return AdapterVersion(model=model, name=name, version=number, uri=self._store.uri(path), manifest=manifest)

    def _last_number(self, model: str, name: str) -> int:
        """Return the highest number that a version of `model:name` has or had."""
        last = max(self.versions(model, name), default=0)
        with contextlib.suppress(UnknownAdapter):
            last = max(last, self.alias(model, name).last_version)
        return last

    def _unwritable(self, error: OSError) -> str:
        return (
            f"The registry {self._store.root} cannot be written ({error.strerror or error}); set KAJIYA_HOME or "
            "KAJIYA_REGISTRY to a place you can write."
        )


def check_name(name: str) -> None:
    """Raise `InvalidAdapterName` unless `name` can be served as `model:name`."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidAdapterName(
            f"{name!r} cannot name an adapter; use 1 to 64 of a-z, 0-9, '.', '_', '-', a letter or digit first."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
