"""The commands `kajiya adapters …`, except `promote`, whose evaluation needs the training packages.

They work on the registry itself, which servers watch, so they need no endpoint; `show` asks one for its counts.
"""

import json
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.catalog import find
from cluster.errors import UserError
from cluster.home import KEY_VARIABLE

if TYPE_CHECKING:
    from cluster.registry import AdapterVersion

adapters = typer.Typer(no_args_is_help=True, help="Look at adapters, try, promote, roll back, pin and remove them.")
out = Console()

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Adapter = Annotated[str, typer.Argument(help="MODEL:ADAPTER")]
Version = Annotated[str, typer.Argument(help="MODEL:ADAPTER@VERSION")]
BaseUrl = Annotated[str, typer.Option(help="The endpoint.")]
DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
ENDPOINT_TIMEOUT_S = 5.0
TIMES = {"seconds": "answer", "first_token_s": "first token", "token_s": "each token"}


class EndpointSilent(UserError, ConnectionError):
    """The endpoint does not say what is asked."""


@adapters.command("list")
def adapters_list(model: Annotated[str | None, typer.Argument()] = None, as_json: Json = False) -> None:  # noqa: FBT002
    """List every version of every adapter."""
    from cluster.registry import Registry
    from cluster.tables import adapters_table

    registry = Registry.default()
    versions = registry.list(find(model).name if model else None)
    if as_json:
        out.print_json(data=[v.manifest.model_dump(mode="json") for v in versions])
    else:
        out.print(adapters_table(registry, versions))


@adapters.command("show")
def adapters_show(
    adapter: Annotated[str, typer.Argument(help="MODEL:ADAPTER[@VERSION]")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Show what the name means, where the version came from, and what each version answered at the endpoint."""
    from cluster.registry import Registry

    model, ref = split_adapter(adapter)
    version = Registry.default().resolve(model, ref)
    alias = Registry.default().alias(model, version.name)
    try:
        counts, reason = endpoint_view(base_url, version)["counts"], ""
    except EndpointSilent as error:
        counts, reason = None, str(error)
    if as_json:
        manifest = version.manifest.model_dump(mode="json")
        out.print_json(data={"alias": alias.model_dump(), "manifest": manifest, "counts": counts})
        return
    out.print(_origin_table(version))
    out.print(f"{model}:{version.name} means version {alias.version}" + (", pinned" if alias.is_pinned else ""))
    if alias.canary:
        out.print(f"{alias.canary.percent:g}% of the users get version {alias.canary.version}")
    out.print(reason, markup=False, soft_wrap=True) if counts is None else out.print(_counts_table(counts))


@adapters.command("rollback")
def adapters_rollback(adapter: Adapter) -> None:
    """End the canary of MODEL:ADAPTER; without one, let it mean the version before again."""
    from cluster.registry import Registry

    model, name = split_adapter(adapter)
    alias = Registry.default().rollback(model, name)
    out.print(f"{model}:{name} means version {alias.version} again, for everybody.")


@adapters.command("canary")
def adapters_canary(
    adapter: Version,
    percent: Annotated[float, typer.Option(min=0.01, max=100, help="Share of the users that get this version.")],
) -> None:
    """Give a part of the users this version: always the same ones, and more of them as PERCENT grows."""
    from cluster.alias import Canary
    from cluster.canary import start_canary
    from cluster.registry import Registry

    version = exact_version(adapter)
    canary = Canary(version=version.version, percent=percent)
    before = Registry.default().alias(version.model, version.name).canary
    alias = start_canary(Registry.default(), version.model, version.name, canary)
    ended = f"; version {before.version} is tried no longer" if before and before.version != canary.version else ""
    out.print(
        f"{percent:g}% of the users of {version.model}:{version.name} get version {version.version}, "
        f"the others version {alias.version}{ended}.",
        soft_wrap=True,
    )


@adapters.command("pin")
def adapters_pin(adapter: Adapter, base_url: BaseUrl = DEFAULT_BASE_URL) -> None:
    """Keep MODEL:ADAPTER in the memory of the replicas, whatever else is asked for."""
    from cluster.pins import pin
    from cluster.registry import Registry

    model, ref = split_adapter(adapter)
    version = Registry.default().resolve(model, ref)
    try:
        max_loras = endpoint_view(base_url, version)["max_loras"]
    except EndpointSilent:
        max_loras = _planned_max_loras(adapter.partition(":")[0])
    pin(Registry.default(), model, ref, max_loras=max_loras)
    out.print(f"{model}:{ref} stays in memory once it is there.")


@adapters.command("unpin")
def adapters_unpin(adapter: Adapter) -> None:
    """Let MODEL:ADAPTER make room for others again."""
    from cluster.pins import unpin
    from cluster.registry import Registry

    model, name = split_adapter(adapter)
    unpin(Registry.default(), model, name)
    out.print(f"{model}:{name} makes room for others again.")


@adapters.command("rm")
def adapters_rm(adapter: Annotated[str, typer.Argument(help="MODEL:ADAPTER@VERSION, or all of MODEL:ADAPTER")]) -> None:
    """Delete a version, or an adapter with all its versions."""
    from cluster.registry import Registry

    model, ref = split_adapter(adapter)
    Registry.default().remove(model, ref)
    out.print(f"Deleted {model}:{ref}.")


def split_adapter(adapter: str) -> tuple[str, str]:
    """Return catalog name and adapter reference of `model:adapter[@version]`."""
    model, colon, ref = adapter.partition(":")
    if not colon or not ref:
        raise UserError(f"{adapter!r} names no adapter; write MODEL:ADAPTER or MODEL:ADAPTER@VERSION.")
    return find(model).name, ref


def exact_version(adapter: str) -> "AdapterVersion":
    """Return the registered version that `model:adapter@version` names; raises `UserError`, `UnknownAdapter`."""
    from cluster.registry import Registry

    model, ref = split_adapter(adapter)
    if "@" not in ref:
        raise UserError(f"{adapter!r} names no version; write MODEL:ADAPTER@VERSION.")
    return Registry.default().resolve(model, ref)


def endpoint_view(base_url: str, version: "AdapterVersion") -> dict[str, Any]:
    """Return what the endpoint says of an adapter (`GET /v1/adapters/…`).

    Raises:
        EndpointSilent: it does not answer, or not this.
    """
    url = f"{base_url}/adapters/{version.served_name}"
    key = os.environ.get(KEY_VARIABLE)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=ENDPOINT_TIMEOUT_S) as response:  # noqa: S310 (the user's own URL)
            view: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise EndpointSilent(f"{base_url} answers {error.code} {error.reason}, so there are no counts.") from error
    except (OSError, ValueError) as error:
        raise EndpointSilent(f"No endpoint answers at {base_url}, so there are no counts.") from error
    return view


def _planned_max_loras(model: str) -> int:
    from cluster.hardware import detect
    from cluster.plan import plan_serving

    return plan_serving(find(model), detect()).max_loras


def _origin_table(version: "AdapterVersion") -> Table:
    manifest = version.manifest
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_row("adapter", version.served_name)
    table.add_row("base", f"{manifest.base_model_id}, weights {manifest.base_fingerprint}, {manifest.precision}")
    table.add_row("data", f"{manifest.data.file}, {manifest.data.num_samples} samples, {manifest.data.sha256}")
    table.add_row("trained", manifest.created_at)
    for name, value in manifest.metrics.items():
        table.add_row(name, f"{value:g}")
    return table


def _counts_table(counts: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("version", justify="right")
    for header in ("requests", "errors", "tokens", *(f"{name}, ms\np50/p90/p99" for name in TIMES.values())):
        table.add_column(header, justify="right")
    for one in counts:
        numbers = (one["version"], one["num_requests"], one["num_errors"], one["num_completion_tokens"])
        times = ("/".join(f"{1000 * one[name][p]:.4g}" for p in one[name]) if one[name] else "-" for name in TIMES)
        table.add_row(*map(str, numbers), *times)
    return table
