"""At which steps trials report, and in which order trials of one pack do."""

from collections.abc import Sequence


def rungs(num_steps: int, *, first: int, reduction_factor: int) -> tuple[int, ...]:
    """Return the steps at which trials are compared: `first`, each next one `reduction_factor` times as late, the end.

    Raises:
        ValueError: `first` is not within the run.
    """
    if not 1 <= first <= num_steps:
        raise ValueError(f"the first rung is at step {first} of {num_steps}")
    steps = [first]
    while steps[-1] * reduction_factor < num_steps:
        steps.append(steps[-1] * reduction_factor)
    return tuple(sorted({*steps, num_steps}))


def release_order(losses: Sequence[float], *, reduction_factor: int) -> list[int]:
    """Return the order in which trials that reached a rung together report to an asynchronous scheduler.

    ASHA (arXiv:1810.05934) compares a trial with those that reported before it, so of trials that arrive together
    those that happen to report first go on, however bad. In this order exactly the best 1 / `reduction_factor` go on,
    as with synchronous halving: they report first, the worst of them before the better, and are each the best so far;
    all others come after them and are worse.
    """
    best_first = sorted(range(len(losses)), key=lambda i: losses[i])
    num_kept = max(1, len(losses) // reduction_factor)
    return best_first[:num_kept][::-1] + best_first[num_kept:]
