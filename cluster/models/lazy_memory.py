"""Zeros that take memory where they are written: a bank has room for large adapters, and most are small."""

import math
import mmap

import torch


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros of `shape`; on a CPU, pages that nobody writes to are never there."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Not numpy's zeros: it asks for huge pages, and one written value would then take 2 MiB.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
