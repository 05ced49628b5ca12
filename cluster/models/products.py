"""Products with the weights of frozen layers, by the faster of the two libraries that torch has on a CPU.

torch multiplies float32 matrices by MKL, which keeps to AVX2 on CPUs of AMD. oneDNN uses AVX-512 on all that have it:
on an EPYC with two cores, 490 against 215 GFLOP/s, with the same float32 sums in another order.

N = rows, d = inputs, o = outputs.
"""

import functools
import os

import torch
from torch.nn import functional

CACHED_PRODUCTS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""How many shapes oneDNN keeps code for. By default 1,024: almost every pass has another number of tokens, and each
shape takes 0.7 MiB, as much as it saves milliseconds."""
NUM_CACHED_PRODUCTS = "64"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x` [N, d] times `weight` [o, d] transposed, plus `bias` [o]: [N, o]. Autograd does not see it."""
    is_exact = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if is_exact and len(x) and (multiply := _onednn_linear()):
        product: torch.Tensor = multiply(x, weight, bias, "none", [], "")
        return product
    return functional.linear(x, weight, bias)


def times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x` [N, o] times `weight` [o, d]: [N, d]. Autograd does not see it."""
    return linear(x, weight.T)


@functools.cache
def _onednn_linear():  # type: ignore[no-untyped-def]
    """Return torch's product by oneDNN, or None where MKL's is as good."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":  # type: ignore[no-untyped-call]
        return None
    os.environ.setdefault(CACHED_PRODUCTS, NUM_CACHED_PRODUCTS)  # oneDNN reads it at its first product
    # The overload itself: finding it anew would take microseconds in every layer.
    return torch.ops.mkldnn._linear_pointwise.default
