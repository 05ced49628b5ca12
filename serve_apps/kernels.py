"""The small steps between a decoder layer's products, in C where the machine has a compiler.

Between two products that stream weights through the caches, every operation of torch starts cold and costs about ten
microseconds, whatever it computes; a layer has some forty. `kernels.c` does them in five calls, and reads the keys and
values of a batch where they lie. It is compiled for this processor at the first start, in under a second, and kept.

N = rows, D = head size, S = cached tokens of the longest row.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cluster.home import kajiya_home, make_home_folder

SOURCE = Path(__file__).with_name("kernels.c")
COMPILE = ("-c", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
# Without -ffast-math: linking with it would make the whole process flush denormal numbers.
LINK = ("-shared", "-fopenmp", "-lm")
TIMEOUT_S = 60

_log = logging.getLogger(__name__)
_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Updates:
    """Adapters on linear layers of one input whose results lie side by side, as `add_updates` reads them."""

    def __init__(self, weights: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take A [K, R, d_in] and B [K, R, d_out] of each layer that has some, by the place where its results begin."""
        self.weights = weights
        self.max_r = next(iter(weights.values()))[0].shape[1]
        self.a = _array(ctypes.c_void_p, (lora_a.data_ptr() for lora_a, _ in weights.values()))
        self.b = _array(ctypes.c_void_p, (lora_b.data_ptr() for _, lora_b in weights.values()))
        self.places = _array(ctypes.c_int64, weights)
        self.widths = _array(ctypes.c_int64, (lora_b.shape[2] for _, lora_b in weights.values()))


class Kernels:
    """The functions of the compiled `library`, for float32 tensors on the CPU whose rows are contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rms_norm = _function(library, "rms_norm", _POINTER, 3, _COUNT, 2, _NUMBER, 1)
        self._turn = _function(library, "turn", _POINTER, 3, _COUNT, 4)
        self._silu_and_mul = _function(library, "silu_and_mul", _POINTER, 2, _COUNT, 2)
        self._add_updates = _function(library, "add_updates", _POINTER, 9, _COUNT, 5)
        self._attend = _function(library, "attend", _POINTER, 7, _COUNT, 6, _NUMBER, 1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return `x` [N, width] over the root of its mean square, times `weight` [width]."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, epsilon)
        return out

    def turn(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *, num_turned: int) -> None:
        """Turn the first heads of `heads` [N, heads, D] in place; cosines, and sines half negative, are [N, D]."""
        rows, num_heads, size = heads.shape
        self._turn(heads.data_ptr(), cosines.data_ptr(), sines.data_ptr(), rows, num_heads, num_turned, size)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu of the first half of `gate_up` [N, 2 I], times the second."""
        rows, both = gate_up.shape
        out = gate_up.new_empty(rows, both // 2)
        self._silu_and_mul(gate_up.data_ptr(), out.data_ptr(), rows, both // 2)
        return out

    def add_updates(
        self,
        x: torch.Tensor,  # [N, d_in]
        updates: Updates,
        slots: torch.Tensor,  # [N], int64
        ranks: torch.Tensor,  # [N], int64
        scales: torch.Tensor,  # [N]
        out: torch.Tensor,  # [N, widths of all layers]
    ) -> None:
        """Add to each row of `out` its `x` times A^T B of the first `ranks` of the adapter in its slot, scaled."""
        weights = (updates.a, updates.b, updates.places, updates.widths)
        routing = (slots.data_ptr(), ranks.data_ptr(), scales.data_ptr())
        counts = (len(updates.weights), len(x), updates.max_r, x.shape[1], out.stride(0))
        self._add_updates(x.data_ptr(), *weights, *routing, out.data_ptr(), *counts)

    def attend(
        self,
        query: torch.Tensor,  # [N, H, D]; rows may lie apart
        keys: torch.Tensor,  # [.., H / G, D], the cache of one layer
        values: torch.Tensor,
        places: torch.Tensor,  # [N, S], int64
        lengths: torch.Tensor,  # [N], int64
        scores: torch.Tensor,  # [N, H, S], to work in
        scaling: float,
    ) -> torch.Tensor:
        """Return the attention [N, H, D] of each row over the `lengths` first of its `places` in the cache."""
        rows, heads, size = query.shape
        num_kv = keys.shape[1]
        out = query.new_empty(rows, heads, size)
        tensors = (query, keys, values, places, lengths, scores, out)
        counts = (rows, places.shape[1], num_kv, heads // num_kv, size, query.stride(0))
        self._attend(*(tensor.data_ptr() for tensor in tensors), *counts, scaling)
        return out


@cache
def kernels() -> Kernels | None:
    """Return the kernels, compiled once per machine; None where that is not possible, and torch does the work."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    try:
        return Kernels(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("kernels.c could not be compiled and loaded (%s); torch's own operations are used", error)
        return None


def _compiled(compiler: str) -> Path:
    content = SOURCE.read_bytes() + repr((COMPILE, LINK, _processor())).encode()
    library = kajiya_home() / "kernels" / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not library.exists():
        make_home_folder("kernels")
        with tempfile.TemporaryDirectory(dir=library.parent) as staging:
            # Several replicas may start at once: each compiles its own, and the last one stays.
            compiled, linked = f"{staging}/kernels.o", f"{staging}/kernels.so"
            for arguments in ((*COMPILE, str(SOURCE), "-o", compiled), (compiled, *LINK, "-o", linked)):
                subprocess.run([compiler, *arguments], check=True, capture_output=True, timeout=TIMEOUT_S)
            Path(linked).replace(library)
    return library


def _processor() -> str:
    """Return what `-march=native` depends on: a home folder may be shared by different machines."""
    if not Path("/proc/cpuinfo").exists():
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _array(kind: type[ctypes.c_void_p | ctypes.c_int64], values: Iterable[int]) -> "ctypes.Array[Any]":
    listed = list(values)
    return (kind * len(listed))(*listed)


def _function(library: ctypes.CDLL, name: str, *kinds_and_counts: type | int) -> "ctypes._NamedFuncPointer":
    function = library[name]
    kinds, counts = kinds_and_counts[::2], kinds_and_counts[1::2]
    function.argtypes = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]  # type: ignore
    function.restype = None
    return function
