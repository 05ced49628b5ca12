"""What clients are told who waited in vain; that they do wait, and for what, is proven on a cluster."""

import time

import pytest
from ray.serve.exceptions import BackPressureError

from serve_apps.refusals import Refusal
from serve_apps.states import ModelState, ReplicaState
from serve_apps.waking import no_room, too_many


def state(*, status: str = "UPSCALING", num_running: int = 0, node_ip: str | None = None) -> ModelState:
    starting = ReplicaState(replica_id="a", state="STARTING", node_ip=node_ip, start_time_s=time.time() - 60)
    return ModelState(
        model="m",
        status=status,
        message="",
        num_running=num_running,
        num_starting=1,
        num_stopping=0,
        target_num_replicas=1,
        min_replicas=0,
        max_replicas=4,
        num_gpus=0.5,
        accelerator_type="A100",
        replicas=(starting,),
    )


@pytest.mark.parametrize(
    ("states", "words", "code"),
    [
        ([state()], "m waits for a node with 0.5 A100 free", "model_not_ready"),
        ([state(node_ip="10.0.0.1")], "m is being loaded", "model_not_ready"),
        ([state(num_running=4)], "m has 4 of at most 4 replicas, and they are full", "model_not_ready"),
        ([state(status="UNHEALTHY")], "m does not start", "model_unavailable"),
        ([], "its application is being deployed", "model_not_ready"),
    ],
)
def test_a_wait_in_vain_is_a_503_that_says_why_and_when_to_come_back(
    states: list[ModelState], words: str, code: str
) -> None:
    refusal = no_room(120, states)
    assert isinstance(refusal, Refusal)
    assert words in str(refusal)
    assert (refusal.status, refusal.code) == (503, code)
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s > 0


def test_a_full_queue_is_the_status_that_the_deployment_was_given() -> None:
    error = BackPressureError(num_queued_requests=256, max_queued_requests=256, status_code=429, retry_after_s=5)
    refusal = too_many("m", error)
    assert (refusal.status, refusal.retry_after_s) == (429, 5)
    assert "256 requests wait for m" in str(refusal)
