"""The machines a plan is made for: declared by name as Ray spells it, or what is here."""

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError

MIB = 2**20
CPUS_PER_GPU = 8
RAM_PER_GPU_MEMORY = 2
"""Cores and RAM of a declared GPU node, where they are not given: what the clouds put beside these GPUs (8 to 26 cores,
about twice the GPU's memory: 48 GB by an A10G, 85 by an A100-40G, 170 by an A100-80G, 234 by an H100)."""
VNNI = ("avx512_vnni", "avx_vnni")
CPU_FEATURES = ("avx512f", *VNNI)
"""What decides which quantized checkpoints a CPU multiplies, and how exactly, as `/proc/cpuinfo` names it."""
CPU_NODE_CORES = 8
CPU_NODE_RAM_BYTES = 32 * 2**30


class UnknownHardware(UserError, LookupError):
    """No GPU of that name is known, or the numbers given cannot be a machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of accelerator."""

    name: str
    """As Ray names it (`ray.util.accelerators`), which is what `accelerator_type` takes."""
    memory_bytes: int
    """All of its memory; what of it a plan uses is `gpu_memory_utilization`."""
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
    cpu_features: tuple[str, ...] | None = None
    """Those of `CPU_FEATURES` that the cores have; None of a machine that is not here."""

    def has_cpu_feature(self, *any_of: str) -> bool | None:
        """Return whether the cores have one of these, None where nobody knows."""
        return None if self.cpu_features is None else not set(any_of).isdisjoint(self.cpu_features)

    def __str__(self) -> str:
        """Return it as a person would say it."""
        host = f"{self.num_cpus} cores, {self.ram_bytes / 2**30:.1f} GiB RAM"
        if self.gpu is None:
            return f"CPU ({host})"
        return f"{self.num_gpus} x {self.gpu.name} ({self.gpu.memory_bytes / 2**30:.1f} GiB each), {host}"


def _gpu(name: str, memory_mib: int, major: int, minor: int) -> Gpu:
    return Gpu(name=name, memory_bytes=memory_mib * MIB, compute_capability=(major, minor))


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("K80", 11441, 3, 7),
        _gpu("P4", 7611, 6, 1),
        _gpu("P100", 16280, 6, 0),
        _gpu("V100", 16160, 7, 0),
        _gpu("T4", 15360, 7, 5),
        _gpu("A10G", 23028, 8, 6),
        _gpu("A100", 40960, 8, 0),
        _gpu("A100-40G", 40960, 8, 0),
        _gpu("A100-80G", 81920, 8, 0),
        _gpu("L4", 23034, 8, 9),
        _gpu("L40S", 46068, 8, 9),
        _gpu("H100", 81559, 9, 0),
        _gpu("H20", 97871, 9, 0),
        _gpu("H200", 143771, 9, 0),
        _gpu("B200", 183359, 10, 0),
        _gpu("GB200", 177490, 10, 0),
        _gpu("B300", 250339, 10, 3),
        _gpu("GB300", 264909, 10, 3),
        _gpu("RTX-PRO-6000", 97887, 12, 0),
        _gpu("RTX-A6000", 49140, 8, 6),
        _gpu("GeForce-RTX-3090", 24576, 8, 6),
        _gpu("GeForce-RTX-4090", 24564, 8, 9),
        _gpu("GeForce-RTX-5090", 32607, 12, 0),
    )
}
"""NVIDIA's GPUs with the MiB that `nvidia-smi` reports as memory.total (GB200, B300, GB300: the data sheet's total of a
system, 13.4, 2.1 and 20 TB, over its 72, 8 and 72 GPUs). A name of several boards (V100, A100) is the smallest."""


def declared(
    *, gpu: str | None, num_gpus: int = 1, num_cpus: int | None = None, ram_bytes: int | None = None
) -> Hardware:
    """Return hardware that need not be here, by Ray's accelerator name (any case); `gpu=None` is a CPU node.

    Raises:
        UnknownHardware: a name or a number that no machine has.
    """
    counts = {"num_gpus": num_gpus, "num_cpus": num_cpus, "ram_bytes": ram_bytes}
    wrong = [f"{name}={count}" for name, count in counts.items() if count is not None and count < 1]
    if wrong:
        raise UnknownHardware(f"Hardware needs positive numbers; got {', '.join(wrong)}.")
    if gpu is None:
        return Hardware(
            gpu=None, num_gpus=0, num_cpus=num_cpus or CPU_NODE_CORES, ram_bytes=ram_bytes or CPU_NODE_RAM_BYTES
        )
    card = _find(gpu)
    return Hardware(
        gpu=card,
        num_gpus=num_gpus,
        num_cpus=num_cpus or CPUS_PER_GPU * num_gpus,
        ram_bytes=ram_bytes or RAM_PER_GPU_MEMORY * card.memory_bytes * num_gpus,
    )


def _find(name: str) -> Gpu:
    by_lower = {known.lower(): gpu for known, gpu in GPUS.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = [GPUS[n].name for n in GPUS if n.lower() in difflib.get_close_matches(name.lower(), by_lower, 3, 0.5)]
    raise UnknownHardware(
        f"No GPU called {name!r}; {'near it: ' + ', '.join(near) + '; ' if near else ''}known: {', '.join(GPUS)}."
    )


def detect() -> Hardware:
    """Return what this machine has: GPUs by `nvidia-smi`, the cores this process may use, RAM within its cgroup."""
    gpus = _nvidia_gpus()
    return Hardware(
        gpu=min(gpus, key=lambda gpu: gpu.memory_bytes) if gpus else None,
        num_gpus=len(gpus),
        num_cpus=len(os.sched_getaffinity(0)),
        ram_bytes=_ram_bytes(),
        cpu_features=_cpu_features(),
    )


def _cpu_features() -> tuple[str, ...] | None:
    path = Path("/proc/cpuinfo")
    return parse_cpuinfo(path.read_text()) if path.exists() else None


def parse_cpuinfo(text: str) -> tuple[str, ...] | None:
    """Return those of `CPU_FEATURES` that Linux lists for the first core; None of a core that is not of x86."""
    for line in text.splitlines():
        if line.startswith("flags"):
            flags = line.partition(":")[2].split()
            return tuple(feature for feature in CPU_FEATURES if feature in flags)
    return None


def _nvidia_gpus() -> list[Gpu]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    # A driver that is installed without a device answers with an error: that is a machine without a GPU.
    return parse_nvidia_smi(result.stdout) if result.returncode == 0 else []


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Return the GPUs of `nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits`."""
    gpus = []
    for line in text.strip().splitlines():
        name, memory_mib, capability = (cell.strip() for cell in line.split(","))
        major, minor = capability.split(".")
        gpus.append(_gpu(ray_name(name), int(memory_mib), int(major), int(minor)))
    return gpus


def ray_name(nvml_name: str) -> str:
    """Return Ray's accelerator name for a device name of NVML, by Ray's rule (`nvidia_gpu.py`, Ray 2.60)."""
    match = re.match(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)", nvml_name)
    if match and len(match.group(1)) > 1:
        return match.group(1).replace(" ", "-")
    return re.sub(r"^NVIDIA\s+", "", nvml_name).strip().replace(" ", "-")


def _ram_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    within = [int(text) for path in limits if path.exists() and (text := path.read_text().strip()).isdigit()]
    return min(total, *within) if within else total
