"""Jobs find the cluster that runs, and do not wait for one that is gone."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from train_jobs import connection
from train_jobs.connection import ClusterGone, connect


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def gone() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each `ray.init`, in a process that knows no cluster."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *words: calls.append(words))
    monkeypatch.setattr(connection, "find_bootstrap_address", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


@pytest.mark.parametrize("address", [None, "auto", "local", "ray://far:10001"])
def test_ray_decides_where_no_port_can_be_asked(
    begun: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    connect()
    assert begun == [()]


def test_the_cluster_that_runs_is_joined(
    begun: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, listening: str
) -> None:
    monkeypatch.setattr(connection, "find_bootstrap_address", lambda _: listening)
    connect()
    assert begun == [()]


def test_a_cluster_that_left_nothing_but_its_address_is_passed_over_and_named(
    begun: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "find_bootstrap_address", lambda _: gone)
    connect()
    assert begun == [("local",)]
    assert gone in capsys.readouterr().err


def test_a_named_cluster_that_is_gone_is_an_error(
    begun: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", gone)
    with pytest.raises(ClusterGone, match=f"{gone}, which RAY_ADDRESS names"):
        connect()
    assert begun == []


def test_a_process_that_is_connected_stays_so(begun: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    connect()
    assert begun == []
