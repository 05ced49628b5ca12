"""The endpoint's listening socket, kept open by a process of its own while the ingress comes and goes.

As with systemd's socket activation: whoever is up accepts on the same socket, and while nobody is (a new ingress is
starting, or a killed one starts again), connections wait in the kernel's queue and none is refused.
"""

import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import UserError

DOOR = "kajiya-door"
"""Name of the actor that holds the socket."""
BACKLOG = 2048
"""Connections that wait to be accepted (uvicorn's own default)."""
TIMEOUT_S = 30


class CannotListen(UserError, OSError):
    """The address of the endpoint cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the endpoint listens."""

    host: str
    port: int


class Door:
    """Holds the socket, and hands it to processes of the same user on this machine."""

    def __init__(self) -> None:
        self._address: Address | None = None
        self._socket: socket.socket | None = None
        # In Linux's abstract namespace, so that no file outlives the process.
        self._name = f"\0{DOOR}-{os.getpid()}-{os.urandom(8).hex()}"
        self._handing = socket.socket(socket.AF_UNIX)
        self._handing.bind(self._name)
        self._handing.listen()
        threading.Thread(target=self._hand_out, daemon=True).start()

    def open(self, address: Address) -> str:
        """Listen at `address`, and nowhere else any more; return where the socket is handed out.

        Raises:
            CannotListen: The address is taken or not this machine's.
        """
        if address != self._address:
            opened = _listen(address)
            if self._socket is not None:
                self._socket.close()
            self._address, self._socket = address, opened
        return self._name

    def _hand_out(self) -> None:
        while True:
            asking, _ = self._handing.accept()
            with asking:
                if self._socket is not None and _uid_of_peer(asking) == os.getuid():
                    socket.send_fds(asking, [b"."], [self._socket.fileno()])


def listening_socket(address: Address) -> socket.socket:
    """Return the socket that listens at `address`, opened now or by an ingress before this one; blocks.

    Raises:
        CannotListen: The address is taken or not this machine's.
    """
    options: dict[str, Any] = {
        "name": DOOR,
        "namespace": DOOR,
        "get_if_exists": True,
        "lifetime": "detached",  # it has to outlive the ingress that made it
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    door = ray.remote(Door).options(**options).remote()
    name = ray.get(door.open.remote(address), timeout=TIMEOUT_S)
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(TIMEOUT_S)
        asking.connect(name)
        _, (descriptor, *_), _, _ = socket.recv_fds(asking, 1, 1)
    return socket.socket(fileno=descriptor)


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((address.host, address.port))
    except OSError as error:
        opened.close()
        message = f"The endpoint cannot listen at {address.host}, port {address.port}: {error.strerror}."
        raise CannotListen(message) from None
    opened.listen(BACKLOG)
    return opened


def _uid_of_peer(connection: socket.socket) -> int:
    """Return the user id of the process at the other end (`struct ucred`: pid, uid, gid)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid
