"""What the replicas of each model do at the moment, as Serve's controller knows it. Asking wakes no model."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve._private.common import DeploymentStatus
from ray.serve._private.common import ReplicaState as Replica
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle

from serve_apps.facts import ModelFacts

PLACEMENT_S = 5.0
"""A replica that is on no node after so long waits for room; Ray needs a second or two to start a process."""
STARTING = ("STARTING", "UPDATING", "RECOVERING")
STOPPING = ("STOPPING", "PENDING_MIGRATION")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaState:
    """One replica."""

    replica_id: str
    state: str
    """Serve's word: STARTING, RUNNING, STOPPING and so on."""
    node_ip: str | None
    """None until it is placed."""
    start_time_s: float
    """When it was asked for, in seconds since the epoch."""

    @property
    def is_waiting(self) -> bool:
        """Whether no node has room for it."""
        is_late = time.time() - self.start_time_s > PLACEMENT_S
        return self.state in STARTING and self.node_ip is None and is_late


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """The replicas of one model."""

    model: str
    status: str
    """Serve's word for the deployment: HEALTHY, UPSCALING, DOWNSCALING, UNHEALTHY and so on."""
    message: str
    """Serve's reason, where there is one."""
    num_running: int
    num_starting: int
    num_stopping: int
    target_num_replicas: int
    min_replicas: int
    max_replicas: int
    num_gpus: float
    """GPUs of one replica, or its share of one."""
    accelerator_type: str | None
    """The kind of GPU it is placed on, as Ray names it."""
    replicas: tuple[ReplicaState, ...]

    @property
    def phase(self) -> str:
        """`running`, `starting`, `waiting` for a node with room, `asleep` at zero, or `failed`."""
        if self.num_running:
            return "running"
        if self.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            return "failed"
        if any(replica.is_waiting for replica in self.replicas):
            return "waiting"
        return "starting" if self.target_num_replicas else "asleep"


def why_not_running(state: ModelState) -> str:
    """Return in a few words what a request to the model of `state` waits for."""
    if state.phase == "running":
        return f"{state.model} has {state.num_running} of at most {state.max_replicas} replicas, and they are full"
    if state.phase == "waiting":
        needs = f"{state.num_gpus:g} {state.accelerator_type or 'GPU'}" if state.num_gpus else "a CPU"
        return f"{state.model} waits for a node with {needs} free"
    return f"{state.model} is being loaded"


async def model_states(handles: Mapping[str, DeploymentHandle], facts: Mapping[str, ModelFacts]) -> list[ModelState]:
    """Return the state of the models whose deployments `handles` (by model name) lead to."""
    controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = await controller.get_serve_instance_details.remote()
    states = []
    for model, handle in handles.items():
        app = details["applications"].get(handle.app_name, {"deployments": {}})
        deployment = app["deployments"].get(handle.deployment_name)
        if deployment is not None:  # while an application starts, not all of them are there
            states.append(state_of(facts[model], deployment))
    return states


def state_of(facts: ModelFacts, deployment: Mapping[str, Any]) -> ModelState:
    """Return the state that one entry of the controller's `DeploymentDetails` describes."""
    replicas = tuple(
        ReplicaState(
            replica_id=r["replica_id"],
            state=Replica(r["state"]).value,
            node_ip=r.get("node_ip"),
            start_time_s=r["start_time_s"],
        )
        for r in deployment["replicas"]
    )
    counts = Counter(replica.state for replica in replicas)
    scaling = deployment["deployment_config"].get("autoscaling_config") or {}
    target = deployment["target_num_replicas"]
    return ModelState(
        model=facts.name,
        status=DeploymentStatus(deployment["status"]).value,
        message=deployment["message"],
        num_running=counts["RUNNING"],
        num_starting=sum(counts[state] for state in STARTING),
        num_stopping=sum(counts[state] for state in STOPPING),
        target_num_replicas=target,
        min_replicas=scaling.get("min_replicas", target),
        max_replicas=scaling.get("max_replicas", target),
        num_gpus=facts.num_gpus,
        accelerator_type=facts.accelerator_type,
        replicas=replicas,
    )
