"""How many replicas the planned concurrency asks for, judged by Serve's own classes and its own policy."""

from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig

from cluster.catalog import find
from cluster.hardware import declared, detect
from cluster.plan import ServingPlan, plan_serving
from kajiya import up
from serve_apps.app import hardware_of
from serve_apps.args import BadReplicas, ModelArgs, ServeArgs
from serve_apps.scaling import deployment_options

SMOLLM2 = "smollm2-135m-instruct"


def plan_on(gpu: str | None, *, num_gpus: int = 1, **wishes: Any) -> ServingPlan:
    hardware = declared(gpu=gpu, num_gpus=num_gpus) if gpu else detect()
    return plan_serving(find(SMOLLM2), hardware, **wishes)


def options_of(plan: ServingPlan, **replicas: Any) -> dict[str, Any]:
    options = deployment_options(plan, ModelArgs(model=SMOLLM2, **replicas))
    DeploymentConfig(**{name: value for name, value in options.items() if name != "num_replicas"})  # Serve takes it
    return options


def test_another_replica_is_asked_for_when_the_batch_is_three_quarters_full() -> None:
    options = options_of(plan_on("A100", num_gpus=2, max_num_seqs=16), min_replicas=1)
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert config.target_ongoing_requests == 12
    assert options["max_ongoing_requests"] == 24  # half a batch waits at the replica


@pytest.mark.parametrize(("max_num_seqs", "target", "ongoing"), [(1, 1, 2), (2, 1, 3), (4, 3, 6), (64, 48, 96)])
def test_small_batches_have_a_target_that_they_can_reach(max_num_seqs: int, target: int, ongoing: int) -> None:
    options = options_of(plan_on("A100", num_gpus=2, max_num_seqs=max_num_seqs))
    assert options["autoscaling_config"]["target_ongoing_requests"] == target
    assert options["max_ongoing_requests"] == ongoing
    assert target <= max_num_seqs < ongoing  # else a busy replica never asks for help, or its batch starves


def test_the_upper_bound_is_what_one_planned_node_holds() -> None:
    plan = plan_on("A100", num_gpus=2)
    assert plan.num_gpus == 0.25  # 5 GiB are more than an eighth of the usable 36.8: four on each of two cards
    config = options_of(plan)["autoscaling_config"]
    assert (config["min_replicas"], config["max_replicas"]) == (1, 8)
    assert options_of(plan, min_replicas=20) == options_of(plan, num_replicas=20)


def test_a_cpu_node_has_one_replica_unless_more_are_asked_for() -> None:
    plan = plan_on(None)
    assert options_of(plan)["num_replicas"] == 1
    assert "autoscaling_config" not in options_of(plan)
    config = options_of(plan, min_replicas=0)["autoscaling_config"]
    assert (config["min_replicas"], config["max_replicas"]) == (0, 1)
    config = options_of(plan, min_replicas=2, max_replicas=4)["autoscaling_config"]
    assert (config["min_replicas"], config["max_replicas"]) == (2, 4)


def test_a_fixed_number_does_not_scale() -> None:
    options = options_of(plan_on("A100", num_gpus=2), num_replicas=3)
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options


def test_the_command_refuses_them_before_it_starts_anything() -> None:
    with pytest.raises(BadReplicas, match="min_replicas=5 is more than max_replicas=4"):
        up([SMOLLM2], min_replicas=5, max_replicas=4)


def test_each_model_may_be_planned_for_nodes_of_its_own() -> None:
    wishes = [ModelArgs(model="a"), ModelArgs(model="b", gpu="t4"), ModelArgs(model="c", gpu="H100", num_gpus=8)]
    nodes = [hardware_of(wish, ServeArgs(models=["a"], gpu="A100")) for wish in wishes]
    found = [(node.gpu.name if node.gpu else None, node.num_gpus) for node in nodes]
    assert found == [("A100", 1), ("T4", 1), ("H100", 8)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_replicas": 2, "min_replicas": 0}, "num_replicas=2 is a fixed number"),
        ({"min_replicas": 5, "max_replicas": 4}, "min_replicas=5 is more than max_replicas=4"),
        ({"max_replicas": 0}, "greater than 0"),
        ({"min_replicas": -1}, "greater than or equal to 0"),
        ({"wake_timeout_s": 0}, "greater than 0"),
    ],
)
def test_numbers_that_exclude_each_other_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelArgs(model=SMOLLM2, **fields)


def test_a_replica_may_finish_what_it_answers_before_it_goes() -> None:
    options = options_of(plan_on("A100"))
    assert options["graceful_shutdown_timeout_s"] >= 600  # Serve's own 20 s would cut a long stream
    assert options["autoscaling_config"]["downscale_delay_s"] >= 60


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    options = options_of(plan_on("A100"), max_queued_requests=7)
    assert options["max_queued_requests"] == 7
    assert options["backpressure_config"] == {"status_code": 429, "retry_after_s": 5.0}
