"""The parts of a running application: which processes they are, how they die, and how a load on them fares."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import ray
from streaming_load import Load

NOTICED_S = 1.0
"""A request may still be sent to a part that has been dead for so long."""


def replicas(deployment: str) -> dict[str, int]:
    """Return the process of each running replica by its name."""
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    found = details["applications"]["kajiya"]["deployments"][deployment]["replicas"]
    return {one["replica_id"]: one["pid"] for one in found if one["state"] == "RUNNING"}


def proxy_pid() -> int:
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    (proxy,) = ray.get(controller.get_serve_instance_details.remote())["proxies"].values()
    actor = ray.get_actor(proxy["actor_name"], namespace="serve")
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return pid


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60) -> float:
    """Return how long it took."""
    begin = time.monotonic()
    while not is_so():
        assert time.monotonic() - begin < timeout_s
        time.sleep(0.1)
    return time.monotonic() - begin


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=60).is_success
    except httpx.ConnectError:
        return False


def kill(load: Load, pid: int) -> float:
    """Kill a process while at least half of the clients read a stream; returns when that was."""
    wait_until(lambda: load.num_open >= load.num_clients // 2)
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def report(name: str, load: Load, **more: Any) -> None:
    wrong = {one.detail for one in load.tries if one.ending == "wrong"}
    tries = sorted(load.num_tries_of_failed)
    print(f"\n{name}: {dict(load.endings)}, tries of those that failed {tries}, {more}, wrong: {wrong}")


def check(load: Load, *, killed_s: float, allowed: set[str]) -> None:
    """Only streams that were under way failed, once each, in one of the `allowed` ways; all else was answered."""
    failed = [one for one in load.tries if one.ending != "done"]
    assert {one.ending for one in failed} <= allowed, [one for one in failed if one.ending not in allowed][:3]
    assert len(failed) <= load.num_clients  # none where the part was idle at that moment
    assert all(one.begin_s < killed_s + NOTICED_S for one in failed)
    assert load.num_given_up == 0
    assert set(load.num_tries_of_failed) <= {2}  # trying again once was enough


def break_engine(deployment: str) -> None:
    """Let the next pass of one replica's engine fail, as it does when memory runs out."""

    def fail(*_: Any) -> Any:
        raise MemoryError

    def break_it(_: Any) -> None:
        from serve_apps.sampling import BatchSampler

        BatchSampler.__call__ = fail  # type: ignore[assignment,method-assign]

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    found = details["applications"]["kajiya"]["deployments"][deployment]["replicas"]
    actor = ray.get_actor(found[0]["actor_name"], namespace="serve")
    ray.get(actor.__ray_call__.remote(break_it))
