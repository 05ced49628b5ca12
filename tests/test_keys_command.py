import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.keys import InvalidKeyName, KeyStore, UnknownKey
from serve_apps.keys_command import BadDuration, NoKeys, check_host, has_keys, keys, parse_duration


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyStore:
    monkeypatch.setenv("KAJIYA_KEYS", str(tmp_path / "keys"))
    return KeyStore.default()


def run(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(keys, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_printed_alone_and_once(store: KeyStore) -> None:
    words = ("--scope", "models:m", "--scope", "adapters:m:shop", "--admin", "--requests-per-minute", "60")
    token = run("create", "ci", *words, "--tokens-per-minute", "1000", "--expires", "30d").strip()
    (record,) = store.list()
    assert record.has_secret(token.removeprefix(f"kj-{record.id}-"))
    assert (record.scopes.models, record.scopes.adapters) == (("m",), ("m:shop",))
    assert (record.is_admin, record.requests_per_minute, record.tokens_per_minute) == (True, 60, 1000)
    assert record.expires_at is not None
    assert abs(record.expires_at - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
    shown = run("list") + run("list", "--json")
    assert token[16:] not in shown
    assert record.secret_sha256 not in shown


def test_the_list_says_what_each_key_may_do_and_how_it_stands() -> None:
    run("create", "plain")
    run("create", "[red]名前", "--scope", "models:m")
    run("revoke", "plain")
    table = run("list")
    assert "[red]名前" in table
    assert "revoked" in table
    listed = json.loads(run("list", "--json"))
    assert [(key["name"], key["scopes"]["models"], key["revoked_at"] is None) for key in listed] == [
        ("plain", ["*"], False),
        ("[red]名前", ["m"], True),
    ]


def test_mistakes_are_named() -> None:
    run("create", "ci")
    with pytest.raises(InvalidKeyName, match="already"):
        run("create", "ci")
    with pytest.raises(UnknownKey, match="in use: ci"):
        run("revoke", "cu")
    with pytest.raises(BadDuration, match="30d"):
        run("create", "b", "--expires", "soon")


@pytest.mark.parametrize(("text", "hours"), [("90m", 1.5), ("12h", 12), ("30d", 720), ("8w", 1344)])
def test_durations(text: str, hours: float) -> None:
    assert parse_duration(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "30", "d", "0d", "-1d", "1y", "1d ", "１d", "999999w"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadDuration):
        parse_duration(text)


def test_other_machines_are_let_in_only_with_a_key_in_use(store: KeyStore) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_host(host)
    assert not has_keys()
    for host in ("0.0.0.0", "::", "192.0.2.1", "kajiya.example", "127.0.0.1.example"):  # noqa: S104
        with pytest.raises(NoKeys, match="kajiya keys create"):
            check_host(host)
    run("create", "ci")
    check_host("0.0.0.0")  # noqa: S104
    run("revoke", "ci")
    with pytest.raises(NoKeys):
        check_host("0.0.0.0")  # noqa: S104
    assert has_keys()  # the endpoint stays closed


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a file where a folder belongs")
    with pytest.raises(UserError, match="set KAJIYA_HOME or KAJIYA_KEYS"):
        run("create", "ci")
