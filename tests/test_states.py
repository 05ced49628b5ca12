"""States read off a record of the controller's, in the form that Ray 2.60's `get_serve_instance_details` gives."""

import time
from typing import Any

import pytest

from serve_apps.states import state_of

GPU = {"num_cpus": 1.0, "num_gpus": 0.25, "accelerator_type": "A100"}
SCALING = {"min_replicas": 0, "max_replicas": 4, "target_ongoing_requests": 12.0}


def replica(state: str, *, node_ip: str | None = "10.0.0.2", age_s: float = 0) -> dict[str, Any]:
    return {"replica_id": "a1", "state": state, "node_ip": node_ip, "start_time_s": time.time() - age_s}


def deployment(*replicas: dict[str, Any], target: int = 1, **fields: Any) -> dict[str, Any]:
    config = {"autoscaling_config": SCALING, "ray_actor_options": GPU}
    record = {"status": "HEALTHY", "message": "", "deployment_config": config, "target_num_replicas": target}
    return record | {"replicas": list(replicas)} | fields


def test_replicas_are_counted_by_what_they_do() -> None:
    many = deployment(replica("RUNNING"), replica("RUNNING"), replica("STARTING"), replica("STOPPING"), target=3)
    state = state_of("m", many)
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
def test_a_phase_says_in_a_word_what_a_client_meets(record: dict[str, Any], phase: str) -> None:
    assert state_of("m", record).phase == phase


def test_a_fixed_number_is_its_own_bounds_and_a_placement_group_is_summed() -> None:
    bundles = [{"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}, {"GPU": 1, "accelerator_type:H100": 0.001}]
    config = {"ray_actor_options": {"num_cpus": 0}, "placement_group_bundles": bundles}
    state = state_of("m", deployment(target=2, deployment_config=config))
    assert (state.min_replicas, state.max_replicas) == (2, 2)
    assert (state.num_gpus, state.accelerator_type) == (2, "H100")


def test_a_model_on_a_cpu_has_no_share_of_a_gpu() -> None:
    state = state_of("m", deployment(deployment_config={"ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0.0}}))
    assert (state.num_gpus, state.accelerator_type) == (0, None)
