"""API keys: made, listed and revoked on any machine that sees the store, and never kept in clear.

<root>/<key id>.json    one file per key, replaced in one step, so that two commands never lose each other's change
"""

import hashlib
import hmac
import os
import re
import secrets
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import UserError
from cluster.home import kajiya_home
from cluster.scopes import Scopes
from cluster.store import FolderStore

ID_PATTERN = re.compile(r"[0-9a-f]{12}")
FILE_PATTERN = re.compile(r"([0-9a-f]{12})\.json")
TOKEN_PATTERN = re.compile(r"kj-([0-9a-f]{12})-([A-Za-z0-9_-]{43})", re.ASCII)
SECRET_BYTES = 32
MAX_NAME_LENGTH = 64


class InvalidKeyName(UserError, ValueError):
    """A name that cannot be shown in a list, or that another key has."""


class UnknownKey(UserError, LookupError):
    """No such key, or more than one."""


class BrokenKey(UserError, ValueError):
    """A key's file that cannot be read."""


class KeysUnusable(UserError, OSError):
    """The store does not answer."""


class KeyRecord(BaseModel):
    """One key, as it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=ID_PATTERN.pattern)
    """Public; the part of the token by which the key is found without trying others."""
    name: str
    """For people."""
    secret_sha256: str = Field(repr=False)
    """A slow hash would protect a password that can be guessed. This secret is 256 random bits, which nobody tries out,
    and a fast hash costs a request microseconds."""
    scopes: Scopes = Scopes()
    is_admin: bool = False
    """May change what is served: promote, roll back, pin and remove adapters over HTTP."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    """Of prompts and answers together."""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def is_expired(self, now: datetime) -> bool:
        """Return whether its time is over."""
        return self.expires_at is not None and now >= self.expires_at

    def is_live(self, now: datetime) -> bool:
        """Return whether requests may use it."""
        return self.revoked_at is None and not self.is_expired(now)

    def has_secret(self, secret: str) -> bool:
        """Return whether `secret` is this key's, in a time that says nothing about how much of it is right."""
        return hmac.compare_digest(hash_secret(secret), self.secret_sha256)


class KeyStore:
    """Keys below one root: a local folder, or a URI that `pyarrow.fs` opens."""

    def __init__(self, root: str | Path) -> None:
        self._store = FolderStore(root)
        self.root = self._store.root

    @classmethod
    def default(cls) -> "KeyStore":
        """Return the store at `KAJIYA_KEYS`, or in the folder `keys` of `KAJIYA_HOME`."""
        return cls(os.environ.get("KAJIYA_KEYS") or kajiya_home() / "keys")

    def create(
        self,
        name: str,
        *,
        scopes: Scopes = Scopes(),
        is_admin: bool = False,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[KeyRecord, str]:
        """Make a key and return it with its token, which is nowhere kept.

        Raises:
            InvalidKeyName: not 1 to 64 printable characters, or a key in use has the name.
        """
        now = datetime.now(UTC)
        label = _checked_name(name)
        if any(record.name == label and record.is_live(now) for record in self.list()):
            raise InvalidKeyName(f"There is a key {label!r} already; revoke it first, or choose another name.")
        secret = secrets.token_urlsafe(SECRET_BYTES)
        record = KeyRecord(
            id=secrets.token_hex(6),
            name=label,
            secret_sha256=hash_secret(secret),
            scopes=scopes,
            is_admin=is_admin,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            created_at=now,
            expires_at=expires_at,
        )
        self._write(record)
        return record, f"kj-{record.id}-{secret}"

    def list(self) -> tuple[KeyRecord, ...]:
        """Return all keys, those that are revoked or expired too, oldest first; raises `BrokenKey`."""
        return tuple(sorted(map(self.read, self.stamps()), key=lambda record: record.created_at))

    def revoke(self, ref: str) -> KeyRecord:
        """Let the key with this id or name be refused from now on; its file stays, so that lists can tell.

        Raises:
            UnknownKey: there is no such key in use.
        """
        record = self.read(ref) if ID_PATTERN.fullmatch(ref) and ref in self.stamps() else self._named(ref)
        if record.revoked_at is not None:
            raise UnknownKey(f"The key {record.name!r} ({record.id}) was revoked at {record.revoked_at:%F %T} UTC.")
        revoked = record.model_copy(update={"revoked_at": datetime.now(UTC)})
        self._write(revoked)
        return revoked

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return when each key's file was changed and its size, by id: enough to see which have to be read again.

        Raises:
            KeysUnusable: the store does not answer.
        """
        try:
            files = self._store.files().items()
        except OSError as error:
            raise self._unusable("read", error) from error
        return {match[1]: stamp for name, stamp in files if (match := FILE_PATTERN.fullmatch(name))}

    def read(self, key_id: str) -> KeyRecord:
        """Return one key; raises `BrokenKey` and `FileNotFoundError`."""
        path = f"{key_id}.json"
        try:
            record = KeyRecord.model_validate_json(self._store.read(path))
        except ValidationError as error:
            raise BrokenKey(f"{self._store.uri(path)} is broken; delete it, and make a new key.") from error
        if record.id != key_id:
            raise BrokenKey(f"{self._store.uri(path)} holds the key {record.id}; delete it.")
        return record

    def _named(self, name: str) -> KeyRecord:
        label = unicodedata.normalize("NFC", name)
        known = self.list()
        found = [record for record in known if record.name == label]
        in_use = [record for record in found if record.revoked_at is None] or found[-1:]
        if len(in_use) == 1:
            return in_use[0]
        if in_use:
            raise UnknownKey(f"{len(in_use)} keys are named {label!r}; give an id: {', '.join(k.id for k in in_use)}.")
        names = ", ".join(sorted(record.name for record in known if record.revoked_at is None)) or "none"
        raise UnknownKey(f"There is no key {name!r}; in use: {names}.")

    def _write(self, record: KeyRecord) -> None:
        try:
            self._store.write_private(f"{record.id}.json", record.model_dump_json(indent=2).encode())
        except OSError as error:
            raise self._unusable("written", error) from error

    def _unusable(self, done: str, error: OSError) -> KeysUnusable:
        reason = error.strerror or type(error).__name__
        return KeysUnusable(
            f"The keys at {self.root} cannot be {done} ({reason}); set KAJIYA_HOME or KAJIYA_KEYS to a place where "
            "they can."
        )


def split_token(token: str) -> tuple[str, str] | None:
    """Return the id and the secret in a token, or None if it is none of ours."""
    match = TOKEN_PATTERN.fullmatch(token)
    return (match[1], match[2]) if match else None


def hash_secret(secret: str) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _checked_name(name: str) -> str:
    label = unicodedata.normalize("NFC", name)
    is_shown = 0 < len(label) <= MAX_NAME_LENGTH and label.isprintable() and label == label.strip()
    if not is_shown or ID_PATTERN.fullmatch(label):
        raise InvalidKeyName(
            f"{name!r} cannot name a key; use 1 to {MAX_NAME_LENGTH} printable characters, no space at either end, "
            "and not the form of a key's id."
        )
    return label
