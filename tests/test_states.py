"""States read off a record of the controller's, in the form that Ray 2.60's `get_serve_instance_details` gives."""

import time
from dataclasses import replace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentStatus
from ray.serve._private.common import ReplicaState as Replica

from cluster.catalog import find
from cluster.hardware import declared
from cluster.plan import plan_serving
from serve_apps.args import ModelArgs
from serve_apps.facts import facts_of
from serve_apps.states import state_of

PLAN = replace(plan_serving(find("smollm2-135m-instruct"), declared(gpu="A100")), num_gpus=0.25)
FACTS = facts_of(PLAN, ModelArgs(model="smollm2-135m-instruct"))
SCALING = {"min_replicas": 0, "max_replicas": 4, "target_ongoing_requests": 12.0}


NOW_S = 1_000_000.0


def replica(state: str, *, node_ip: str | None = "10.0.0.2", age_s: float = 0) -> dict[str, Any]:
    return {"replica_id": "a1", "state": state, "node_ip": node_ip, "start_time_s": NOW_S - age_s}


def deployment(*replicas: dict[str, Any], target: int = 1, **fields: Any) -> dict[str, Any]:
    config = {"autoscaling_config": SCALING}
    record = {"status": "HEALTHY", "message": "", "deployment_config": config, "target_num_replicas": target}
    return record | {"replicas": list(replicas)} | fields


def test_replicas_are_counted_by_what_they_do() -> None:
    many = deployment(replica("RUNNING"), replica("RUNNING"), replica("STARTING"), replica("STOPPING"), target=3)
    state = state_of(FACTS, many)
    assert (state.num_running, state.num_starting, state.num_stopping) == (2, 1, 1)
    assert (state.min_replicas, state.target_num_replicas, state.max_replicas) == (0, 3, 4)
    assert (state.num_gpus, state.accelerator_type) == (0.25, "A100")
    assert state.replicas[0].node_ip == "10.0.0.2"


@pytest.mark.parametrize(
    ("record", "phase"),
    [
        (deployment(target=0), "asleep"),
        (deployment(target=1), "starting"),
        (deployment(replica("STARTING")), "starting"),
        (deployment(replica("STARTING", node_ip=None)), "starting"),
        (deployment(replica("STARTING", node_ip=None, age_s=6)), "waiting"),
        (deployment(replica("STARTING", age_s=100)), "starting"),  # it has a node, and loads
        (deployment(replica("RUNNING"), replica("STARTING", node_ip=None, age_s=6), target=2), "running"),
        (deployment(replica("STARTING"), status="UNHEALTHY"), "failed"),
        (deployment(replica("STOPPING"), target=0), "asleep"),
    ],
)
def test_a_phase_says_in_a_word_what_a_client_meets(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], phase: str
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW_S)
    assert state_of(FACTS, record).phase == phase


def test_a_fixed_number_is_its_own_bounds() -> None:
    state = state_of(FACTS, deployment(target=2, deployment_config={"num_replicas": 2}))
    assert (state.min_replicas, state.max_replicas) == (2, 2)


def test_words_of_serve_are_plain_text() -> None:
    state = state_of(FACTS, deployment(replica(Replica.RUNNING), status=DeploymentStatus.UPSCALING))
    assert f"{state.status} {state.replicas[0].state}" == "UPSCALING RUNNING"
    assert state.num_running == 1
