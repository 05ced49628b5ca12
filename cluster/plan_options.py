"""What to change when a plan does not fit: lighter weights, then other machines, nearest first."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from cluster.hardware import Hardware, declared
from cluster.memory import weights_bytes
from cluster.model_card import ModelCard, Precision
from cluster.plan_precision import half_precision
from cluster.plan_record import Attempt

Wishes = TypeVar("Wishes")
Planner = Callable[[ModelCard, Hardware, Wishes], object]

GPU_COUNTS = (2, 4, 8)
COMMON_GPUS = ("A10G", "A100-40G", "L40S", "A100-80G", "H200", "B200")
"""What is commonly rented, smallest first."""


def lighter_precisions(card: ModelCard, hardware: Hardware, than: Precision | None) -> list[Precision]:
    """Return the precisions that hold the weights in less memory than `than` does, heaviest first."""
    tried: list[Precision] = [half_precision(hardware), "int8", "nf4"]
    return [p for p in tried if than is None or weights_bytes(card, p) < weights_bytes(card, than)]


def machine_groups(
    card: ModelCard, hardware: Hardware, wishes: Wishes, plan: Planner[Wishes]
) -> Iterator[Iterator[Attempt]]:
    """Yield two groups of attempts: more GPUs of this kind, then as many as here of a larger kind, then eight."""
    yield (
        (f"on {machine.num_gpus} x {machine.gpu.name}", partial(plan, card, machine, wishes))
        for machine in _more_gpus(hardware)
        if machine.gpu is not None
    )
    yield (
        (f"on {machine.num_gpus} x {machine.gpu.name}", partial(plan, card, machine, wishes))
        for machine in _larger_gpus(hardware)
        if machine.gpu is not None
    )


def _more_gpus(hardware: Hardware) -> Iterator[Hardware]:
    for count in GPU_COUNTS:
        if hardware.gpu is not None and count > hardware.num_gpus:
            share = count / hardware.num_gpus
            yield replace(
                hardware,
                num_gpus=count,
                num_cpus=int(hardware.num_cpus * share),
                ram_bytes=int(hardware.ram_bytes * share),
            )


def _larger_gpus(hardware: Hardware) -> Iterator[Hardware]:
    here = hardware.gpu.memory_bytes if hardware.gpu else 0
    for count in sorted({max(1, hardware.num_gpus), GPU_COUNTS[-1]}):
        for name in COMMON_GPUS:
            machine = declared(gpu=name, num_gpus=count)
            if machine.gpu is not None and machine.gpu.memory_bytes > here:
                yield machine
