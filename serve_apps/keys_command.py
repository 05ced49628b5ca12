"""The commands `kajiya keys create|list|revoke`."""

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.errors import UserError

if TYPE_CHECKING:
    from cluster.keys import KeyRecord

keys = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")
out = Console()

UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


class NoKeys(UserError, PermissionError):
    """The endpoint would be open to other machines."""


class BadDuration(UserError, ValueError):
    """A time that cannot be read."""


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What people call it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="models:NAME or adapters:MODEL:NAME, with * for any; everything if none is given."),
    ] = None,
    is_admin: Annotated[bool, typer.Option("--admin", help="May promote and remove adapters over HTTP.")] = False,  # noqa: FBT002
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of prompts and answers together.", min=1)] = None,
    expires: Annotated[str | None, typer.Option(help="How long it lives: 30d, 12h, 8w.")] = None,
) -> None:
    """Make a key and print it; it cannot be shown again."""
    from cluster.keys import KeyStore
    from cluster.scopes import parse_scopes

    record, token = KeyStore.default().create(
        name,
        scopes=parse_scopes(scope or ()),
        is_admin=is_admin,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        expires_at=datetime.now(UTC) + parse_duration(expires) if expires else None,
    )
    out.print(token, markup=False, highlight=False, soft_wrap=True)
    Console(stderr=True).print(
        f"This is the key {escape(repr(record.name))}; keep it, it is not shown again. Programs send it as "
        "`Authorization: Bearer KEY`, kajiya chat reads it from KAJIYA_API_KEY.",
        highlight=False,
        soft_wrap=True,
    )


@keys.command("list")
def keys_list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:  # noqa: FBT002
    """List the keys with what each may do, the revoked and expired ones too."""
    from cluster.keys import KeyStore

    records = KeyStore.default().list()
    if as_json:
        out.print_json(data=[record.model_dump(mode="json", exclude={"secret_sha256"}) for record in records])
    else:
        out.print(keys_table(records, datetime.now(UTC)))


@keys.command("revoke")
def keys_revoke(key: Annotated[str, typer.Argument(help="Name or id.")]) -> None:
    """Refuse a key from now on; a running server knows within seconds."""
    from cluster.keys import KeyStore

    record = KeyStore.default().revoke(key)
    out.print(f"Revoked {record.name!r} ({record.id}).", markup=False, highlight=False)


def has_keys() -> bool:
    """Return whether the endpoint asks for keys: it does from the first one on, whatever becomes of it."""
    from cluster.keys import KeyStore

    return bool(KeyStore.default().stamps())


def check_host(host: str) -> None:
    """Raise `NoKeys` if `host` lets other machines in, and there is no key in use that they could show."""
    from cluster.keys import KeyStore
    from serve_apps.loopback import is_loopback_name

    now = datetime.now(UTC)
    if not is_loopback_name(host) and not any(record.is_live(now) for record in KeyStore.default().list()):
        raise NoKeys(f"--host {host} lets other machines in, and no key is in use; first `kajiya keys create NAME`.")


def keys_table(records: "tuple[KeyRecord, ...]", now: datetime) -> Table:
    """Return the table of keys at the time `now`."""
    table = Table("id", "name", "may use", "limits", "state")
    for record in records:
        scopes = [*record.scopes.models, *record.scopes.adapters, *(["admin"] if record.is_admin else [])]
        limits = [
            f"{limit:,} {what}/min"
            for limit, what in ((record.requests_per_minute, "requests"), (record.tokens_per_minute, "tokens"))
            if limit
        ]
        row = (record.id, record.name, ", ".join(scopes), ", ".join(limits) or "none", _state(record, now))
        table.add_row(*map(escape, row))
    return table


def parse_duration(text: str) -> timedelta:
    """Return the time that `30d`, `12h`, `90m` or `8w` says; raises `BadDuration`."""
    match = re.fullmatch(r"([1-9]\d{0,4})([mhdw])", text, re.ASCII)
    if match is None:
        raise BadDuration(f"{text!r} is no time; write a number with m, h, d or w, such as 30d.")
    return timedelta(seconds=int(match[1]) * UNITS_S[match[2]])


def _state(record: "KeyRecord", now: datetime) -> str:
    if record.revoked_at is not None:
        return f"revoked {record.revoked_at:%F}"
    if record.expires_at is None:
        return "in use"
    return f"{'expired' if record.is_expired(now) else 'until'} {record.expires_at:%F %H:%M} UTC"
