"""What a Serve config may say to `serve_apps.app:build`."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import UserError
from cluster.model_card import Precision
from cluster.plan import Engine


class BadReplicas(UserError, ValueError):
    """Numbers of replicas that exclude each other."""


class ModelArgs(BaseModel):
    """One model to serve; what is not given, the plan decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Catalog name, user's entry, hub id or folder."""
    gpu: str | None = None
    """Accelerator of the nodes that serve it, as Ray names it; by default the application's."""
    num_gpus: int | None = Field(default=None, gt=0)
    """GPUs per node, where `gpu` is given; 1 by default."""
    precision: Precision | None = None
    engine: Engine | None = None
    max_model_len: int | None = Field(default=None, gt=0)
    """Tokens of prompt and answer together."""
    max_num_seqs: int | None = Field(default=None, gt=0)
    """Requests in one batch of a replica."""
    num_adapters: int | None = Field(default=None, ge=0)
    """Adapters in a replica's memory at a time."""
    max_lora_rank: int | None = Field(default=None, gt=0)
    min_replicas: int | None = Field(default=None, ge=0)
    """Replicas that are there without load; 1 by default. At 0, a model that nobody asks gives its GPU back, and the
    next request waits until it is loaded again."""
    max_replicas: int | None = Field(default=None, gt=0)
    """Replicas at full load; by default as many as one node of the planned kind holds."""
    num_replicas: int | None = Field(default=None, gt=0)
    """A fixed number, in place of the two."""
    wake_timeout_s: float = Field(default=120, gt=0)
    """How long a request may wait for a replica with room, for instance while the first one loads; then it is answered
    with 503 and Retry-After."""
    max_queued_requests: int = Field(default=256, gt=0)
    """Requests that may wait for a replica with room; more are answered with 429 and Retry-After."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_replicas(self.model, self.min_replicas, self.max_replicas, self.num_replicas)
        return self

    def planned(self) -> dict[str, Any]:
        """Return the wishes that the plan takes; the others concern the deployment around it."""
        return self.model_dump(include=PLANNED)


PLANNED = {"precision", "engine", "max_model_len", "max_num_seqs", "num_adapters", "max_lora_rank"}


def check_replicas(
    model: str, min_replicas: int | None, max_replicas: int | None, num_replicas: int | None = None
) -> None:
    """Raise `BadReplicas` unless there is a number of replicas that agrees with all that is given."""
    if num_replicas is not None and (min_replicas, max_replicas) != (None, None):
        raise BadReplicas(
            f"{model}: num_replicas={num_replicas} is a fixed number; leave out min_replicas and max_replicas, "
            "or leave out num_replicas."
        )
    if min_replicas is not None and max_replicas is not None and min_replicas > max_replicas:
        raise BadReplicas(f"{model}: min_replicas={min_replicas} is more than max_replicas={max_replicas}.")


class ServeArgs(BaseModel):
    """The `args` of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str | ModelArgs] = Field(min_length=1)
    gpu: str | None = None
    """Accelerator of the nodes that will serve, as Ray names it; by default what the machine that builds has."""
    num_gpus: int = Field(default=1, gt=0)
    """GPUs per node, where `gpu` is given."""
    host: str = "127.0.0.1"
    port: int | None = Field(default=None, gt=0, lt=65536)
    """Where the ingress listens by itself, on the head; without a port, Serve's proxy is the only way in."""
