"""What a pack gains on a GPU by arithmetic and bandwidth alone (the roofline of Williams et al. 2009): a prediction.

P = weights of the frozen linears, p = weights of one adapter, n = tokens of one trial's step, K = trials.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """The two numbers of a roofline, as the vendor states them."""

    flop_per_s: float
    """Dense, in bf16."""
    bytes_per_s: float


ACCELERATORS = {
    # NVIDIA's data sheets, SXM versions, without sparsity.
    "H100": Accelerator(flop_per_s=989e12, bytes_per_s=3.35e12),
    "A100-80G": Accelerator(flop_per_s=312e12, bytes_per_s=2.039e12),
}
BASE_FLOP = 4
"""For each frozen weight and token: a multiplication and an addition forwards, and again for the input's gradient."""
ADAPTER_FLOP = 6
"""The same, and once more for the gradient of the weight itself."""
OPTIMIZER_BYTES = 28
"""For each adapter weight: AdamW in fp32 reads weight, gradient and two moments, and writes all but the gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step is made of."""

    base_parameters: int
    base_bytes: int
    """As the base is held; a quantized one is read as it is."""
    adapter_parameters: int


def base_s(work: Work, accelerator: Accelerator, *, num_tokens: int) -> float:
    """Return the time of the frozen products: 4 P n operations, or reading the weights forwards and backwards."""
    arithmetic = BASE_FLOP * work.base_parameters * num_tokens / accelerator.flop_per_s
    return max(arithmetic, 2 * work.base_bytes / accelerator.bytes_per_s)


def adapter_s(work: Work, accelerator: Accelerator, *, num_tokens: int) -> float:
    """Return the time of one adapter: 6 p n operations or reading it twice in fp32, and its optimizer's pass."""
    arithmetic = ADAPTER_FLOP * work.adapter_parameters * num_tokens / accelerator.flop_per_s
    reading = 2 * 4 * work.adapter_parameters / accelerator.bytes_per_s
    return max(arithmetic, reading) + OPTIMIZER_BYTES * work.adapter_parameters / accelerator.bytes_per_s


def gain(work: Work, accelerator: Accelerator, *, num_tokens: int, num_trials: int) -> float:
    """Return how many times faster `num_trials` together are than one after the other."""
    each = adapter_s(work, accelerator, num_tokens=num_tokens)
    alone = base_s(work, accelerator, num_tokens=num_tokens) + each
    together = base_s(work, accelerator, num_tokens=num_tokens * num_trials) + num_trials * each
    return num_trials * alone / together
