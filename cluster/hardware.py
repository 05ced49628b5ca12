"""The machines a plan is made for: declared by name as Ray spells it, or what is here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of accelerator."""

    name: str
    """As Ray names it (`ray.util.accelerators`), which is what `accelerator_type` takes."""
    memory_bytes: int
    compute_capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 runs on tensor cores: Ampere (compute capability 8.0) and later."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One node: its GPUs (all of one kind), cores and RAM."""

    gpu: Gpu | None
    """None is a machine without a GPU."""
    num_gpus: int
    num_cpus: int
    ram_bytes: int


def declared(
    *, gpu: str | None, num_gpus: int = 1, num_cpus: int | None = None, ram_bytes: int | None = None
) -> Hardware:
    """Return hardware that need not be here, by Ray's accelerator name; `gpu=None` is a CPU node."""
    raise NotImplementedError


def detect() -> Hardware:
    """Return what this machine has."""
    raise NotImplementedError
