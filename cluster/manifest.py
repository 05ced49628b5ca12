"""The file beside an adapter's weights that says where it came from."""

from pydantic import BaseModel, ConfigDict, JsonValue


class DataSource(BaseModel):
    """The data an adapter was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    """Name of the file, without its folder."""
    sha256: str
    num_samples: int
    num_trained_tokens: int
    """Tokens with a label in one pass over the data."""


class Manifest(BaseModel):
    """The origin of one adapter version. `Registry.add` fills in `version` and `files`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Catalog name of the base."""
    name: str
    version: int = 0
    base_model_id: str
    base_revision: str | None
    base_fingerprint: str
    """`cluster.models.fingerprint.base_fingerprint` of the weights the adapter was trained on."""
    precision: str
    """Precision of the frozen base during training."""
    adapter: dict[str, JsonValue]
    """The adapter's `AdapterSpec`."""
    plan: dict[str, JsonValue]
    """The training plan, every number with its reason."""
    data: DataSource
    metrics: dict[str, float]
    library_versions: dict[str, str]
    created_at: str
    """UTC, ISO 8601."""
    files: dict[str, str] = {}
    """SHA-256 of each file of the version."""
