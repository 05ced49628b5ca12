"""The Ray cluster that a job works on: the one that runs, or one for this process alone."""

import os
import socket
import sys

import ray
from ray._private.services import find_bootstrap_address

from cluster.errors import UserError

ANSWER_TIMEOUT_S = 5.0
"""Ray itself asks a cluster that is gone for ten minutes."""


class ClusterGone(UserError, ConnectionError):
    """Nothing answers at the address of a Ray cluster."""


def connect() -> None:
    """Connect this process to Ray as `ray.init()` does, unless it is already.

    A cluster that died without `ray stop` leaves its address behind, and Ray would go on asking it; then this process
    gets a Ray of its own, as if there had been none.

    Raises:
        ClusterGone: Nothing answers at `RAY_ADDRESS`.
    """
    if ray.is_initialized():
        return
    named = os.environ.get("RAY_ADDRESS")
    address = named or find_bootstrap_address(None)
    if _is_answered(address):
        ray.init()
    elif named:
        raise ClusterGone(f"No Ray cluster answers at {named}, which RAY_ADDRESS names; start it, or unset that.")
    else:
        print(f"The Ray cluster at {address} is gone; this job starts a Ray of its own.", file=sys.stderr)
        ray.init("local")


def _is_answered(address: str | None) -> bool:
    """Return whether something listens at `address`; there is nothing to ask of `auto`, `local` or `ray://...`."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host:
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True
