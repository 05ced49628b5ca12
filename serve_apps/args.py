"""What a Serve config may say to `serve_apps.app:build`."""

from pydantic import BaseModel, ConfigDict, Field

from cluster.model_card import Precision
from cluster.plan import Engine


class ModelArgs(BaseModel):
    """One model to serve; what is not given, the plan decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Catalog name, user's entry, hub id or folder."""
    precision: Precision | None = None
    engine: Engine | None = None
    max_model_len: int | None = Field(default=None, gt=0)
    """Tokens of prompt and answer together."""
    max_num_seqs: int | None = Field(default=None, gt=0)
    """Requests in one batch of a replica."""
    num_adapters: int | None = Field(default=None, ge=0)
    """Adapters in a replica's memory at a time."""
    max_lora_rank: int | None = Field(default=None, gt=0)
    num_replicas: int = Field(default=1, gt=0)


class ServeArgs(BaseModel):
    """The `args` of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str | ModelArgs] = Field(min_length=1)
    gpu: str | None = None
    """Accelerator of the nodes that will serve, as Ray names it; by default what the machine that builds has."""
    num_gpus: int = Field(default=1, gt=0)
    """GPUs per node, where `gpu` is given."""
