"""The endpoint's socket stays open while those who answer on it change."""

import socket

import pytest
from serving import free_port

from serve_apps.door import Address, CannotListen, Door


def handed_out(name: str) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(name)
        _, (descriptor, *_), _, _ = socket.recv_fds(asking, 1, 1)
    return socket.socket(fileno=descriptor)


def test_a_connection_made_while_nobody_answers_is_answered_by_the_next_who_does() -> None:
    door = Door()
    address = Address(host="127.0.0.1", port=free_port())
    first = handed_out(door.open(address))
    first.close()
    with socket.create_connection((address.host, address.port), timeout=5) as client:
        client.sendall(b"anybody there?")
        with handed_out(door.open(address)) as second:
            second.settimeout(5)
            accepted, _ = second.accept()
            with accepted:
                assert accepted.recv(64) == b"anybody there?"


def test_another_address_takes_the_place_of_the_one_before() -> None:
    door = Door()
    before, after = (Address(host="127.0.0.1", port=free_port()) for _ in range(2))
    door.open(before)
    door.open(after)
    with socket.create_connection((after.host, after.port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((before.host, before.port), timeout=5)


def test_a_port_that_is_taken_is_named_and_the_open_one_stays() -> None:
    door = Door()
    address = Address(host="127.0.0.1", port=free_port())
    door.open(address)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Address(host="127.0.0.1", port=other.getsockname()[1])
        with pytest.raises(
            CannotListen, match=rf"cannot listen at 127\.0\.0\.1, port {taken.port}: Address already in use"
        ):
            door.open(taken)
    with socket.create_connection((address.host, address.port), timeout=5):
        pass
