import hashlib
import hmac
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.keys import BrokenKey, InvalidKeyName, KeyRecord, KeyStore, UnknownKey, split_token

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


def test_the_secret_is_shown_once_and_kept_as_its_hash(store: KeyStore, tmp_path: Path) -> None:
    record, token = store.create("ci")
    key_id, secret = split_token(token) or ("", "")
    assert key_id == record.id
    assert len(secret) == 43  # 256 bits in base64 without padding: 32 x 8 / 6, rounded up
    (file,) = (tmp_path / "keys").iterdir()
    kept = json.loads(file.read_text())
    assert kept["secret_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in file.read_text()
    assert secret not in repr(store.list())
    assert kept["secret_sha256"] not in repr(store.list())


def test_two_keys_share_nothing(store: KeyStore) -> None:
    (first, one), (second, two) = store.create("a"), store.create("b")
    assert first.id != second.id
    assert one[16:] != two[16:]
    assert not first.has_secret(two[16:])
    assert first.has_secret(one[16:])


def test_only_the_owner_can_read_a_key(store: KeyStore, tmp_path: Path) -> None:
    record, _ = store.create("ci")
    store.revoke(record.id)  # written a second time
    (file,) = (tmp_path / "keys").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_secrets_are_compared_in_constant_time(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record, token = store.create("ci")
    compared: list[tuple[str, str]] = []
    genuine = hmac.compare_digest

    def spy(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return genuine(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert record.has_secret(token[16:])
    assert not record.has_secret("x")
    assert compared[0] == (record.secret_sha256, record.secret_sha256)
    assert compared[1] == (hashlib.sha256(b"x").hexdigest(), record.secret_sha256)


@pytest.mark.parametrize("name", ["", " ci", "ci\n", "a" * 65, "\x1b[31mred", "\u202egnp.exe", "0123456789ab"])
def test_a_name_that_a_list_cannot_show_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(InvalidKeyName, match="cannot name a key"):
        store.create(name)
    assert store.list() == ()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "名前", "a b", "x.json", "con"])
def test_a_name_never_becomes_a_path(store: KeyStore, tmp_path: Path, name: str) -> None:
    record, _ = store.create(name)
    assert record.name == name
    assert [path.name for path in (tmp_path / "keys").iterdir()] == [f"{record.id}.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_one_name_written_in_two_ways_is_one_name(store: KeyStore) -> None:
    store.create("café")
    with pytest.raises(InvalidKeyName, match="already"):
        store.create("cafe\u0301")
    assert store.revoke("cafe\u0301").name == "café"


def test_a_name_is_free_again_once_its_key_is_revoked(store: KeyStore) -> None:
    first, _ = store.create("ci")
    assert store.revoke("ci").revoked_at is not None
    second, _ = store.create("ci")
    assert store.revoke("ci").id == second.id
    with pytest.raises(UnknownKey, match="was revoked at"):
        store.revoke(first.id)
    assert [record.id for record in store.list()] == [first.id, second.id]


@pytest.mark.parametrize("ref", ["nobody", "../keys", "ffffffffffff", ""])
def test_revoking_what_is_not_there_names_what_is(store: KeyStore, ref: str) -> None:
    store.create("ci")
    with pytest.raises(UnknownKey, match="in use: ci"):
        store.revoke(ref)


def test_a_key_lives_until_its_expiry(store: KeyStore) -> None:
    record, _ = store.create("ci", expires_at=NOW)
    assert record.is_live(NOW - timedelta(microseconds=1))
    assert not record.is_live(NOW)


def test_a_broken_file_is_named_and_other_files_are_not_keys(store: KeyStore, tmp_path: Path) -> None:
    record, _ = store.create("ci")
    (tmp_path / "keys" / "notes.txt").write_text("x")
    (tmp_path / "keys" / ".0123456789ab.json").write_text("x")
    assert len(store.list()) == 1
    (tmp_path / "keys" / "0123456789ab.json").write_text("{")
    with pytest.raises(BrokenKey, match=r"0123456789ab\.json"):
        store.list()
    (tmp_path / "keys" / "0123456789ab.json").write_text((tmp_path / "keys" / f"{record.id}.json").read_text())
    with pytest.raises(BrokenKey, match=record.id):  # a copied file would make a second key of one secret
        store.list()


@pytest.mark.parametrize(
    "token", ["", "kj-", "none", "kj-0123456789ab-", f"kj-0123456789AB-{'a' * 43}", f"kj-0123456789ab-{'é' * 43}"]
)
def test_what_is_no_token_of_ours_is_not_looked_up(token: str) -> None:
    assert split_token(token) is None


def test_unknown_fields_in_a_file_are_refused(store: KeyStore) -> None:
    record, _ = store.create("ci")
    with pytest.raises(ValueError, match="is_root"):
        KeyRecord.model_validate(record.model_dump() | {"is_root": True})
