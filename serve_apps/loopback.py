"""Whether a request comes from a program of this machine: who may use a server that has no keys."""

import ipaddress
import os
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
PROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"


def is_from_this_machine(scope: Scope) -> bool:
    """Return whether the connection comes from a loopback address, and from no proxy and no page of another site.

    Serve's proxy hands on the address that uvicorn saw. uvicorn replaces it by what a proxy on the same machine says of
    it (`FORWARDED_ALLOW_IPS`), which anybody may have written, so such a request is never local. Neither is one that
    comes through Serve's HAProxy, which hides the address. A browser runs pages of strangers: one of another site names
    that in Origin, and one whose name was pointed at 127.0.0.1 (DNS rebinding) names itself in Host.
    """
    headers = Headers(scope=scope)
    if any(name in headers for name in FORWARDING_HEADERS) or os.environ.get(PROXY_VARIABLE, "0") not in ("", "0"):
        return False
    client = scope.get("client")
    if client is None or not _is_loopback_address(client[0]):
        return False
    if not is_loopback_name(_host_of(f"//{headers.get('host', '')}")):
        return False
    return "origin" not in headers or is_loopback_name(_host_of(headers["origin"]))


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback_name(host: str) -> bool:
    """Return whether a host name or address means the machine that says it."""
    return host == "localhost" or host.endswith(".localhost") or _is_loopback_address(host)


def _is_loopback_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
