"""Training runs whose workers, drivers, nodes and disks die: `python -m benchmarks.kill_matrix`.

Each must end with the losses of the run that nobody disturbed, each step once in its history, and nothing half-written.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.claims import Claim, print_claims
from benchmarks.killing import NUM_STEPS, Ground, ground
from train_jobs.loop import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing that dies."""

    what: str
    tolerance: float
    """Largest difference of a loss; 0 where as many workers as before go on."""
    outcome: Callable[[Ground], Outcome]


def worker(place: Ground) -> Outcome:
    """Kill one of two workers."""
    run = place.new_run("worker")
    place.once(run, after=40, then=place.kill_worker)
    return place.train(run)


def worker_before_any_checkpoint(place: Ground) -> Outcome:
    """Kill one of two workers when there is nothing to go on from."""
    run = place.new_run("early")
    place.in_a_while(8.0, place.kill_worker)
    return place.train(run, checkpoint_steps=10_000)


def driver(place: Ground) -> Outcome:
    """Kill the process that runs the job, and go on with another one."""
    run = place.new_run("driver")
    place.train_elsewhere_and_kill(run, after=40)
    return place.train(run)


def driver_then_fewer_workers(place: Ground) -> Outcome:
    """Go on after the driver with one worker instead of two."""
    run = place.new_run("fewer")
    place.train_elsewhere_and_kill(run, after=40)
    return place.train(run, actual_workers=1)


def sharded_then_single(place: Ground) -> Outcome:
    """Go on with one plain worker where two shared a ZeRO-2 optimizer."""
    run = place.new_run("sharded")
    place.train_elsewhere_and_kill(run, after=40, is_sharded=True)
    return place.train(run, actual_workers=1)


def single_then_sharded(place: Ground) -> Outcome:
    """Go on with two workers that share a ZeRO-2 optimizer where one had it."""
    run = place.new_run("unsharded")
    place.train_elsewhere_and_kill(run, after=40, actual_workers=1)
    return place.train(run, is_sharded=True)


def node(place: Ground) -> Outcome:
    """Kill the raylet of the second node; its worker is gone with it, and the other one goes on alone."""
    run = place.new_run("node")
    place.once(run, after=40, then=place.kill_node)
    outcome = place.train(run, min_workers=1)
    place.add_node()
    return outcome


def announced_node(place: Ground) -> Outcome:
    """Announce that the second node leaves, as a spot instance does, and take it away."""
    run = place.new_run("spot")
    place.in_a_while(8.0, place.drain_node)
    place.once(run, after=1, then=place.kill_node)  # the only checkpoint is the one that the warning asked for
    outcome = place.train(run, min_workers=1, checkpoint_steps=10_000)
    place.add_node()
    return outcome


def disk(place: Ground) -> Outcome:
    """Fill the disk at the second checkpoint, and kill a worker after it."""
    with place.small_disk() as folder:
        run = place.new_run("disk", folder)
        place.in_a_while(12.0, place.kill_worker)
        outcome = place.train(run)
        place.check_whole(run)
        return outcome


CASES = (
    Case(what="worker", tolerance=0, outcome=worker),
    Case(what="worker, before any checkpoint", tolerance=0, outcome=worker_before_any_checkpoint),
    Case(what="driver", tolerance=0, outcome=driver),
    Case(what="driver, then one worker instead of two", tolerance=1e-4, outcome=driver_then_fewer_workers),
    Case(what="driver under ZeRO-2, then one plain worker", tolerance=1e-4, outcome=sharded_then_single),
    Case(what="driver of one worker, then two under ZeRO-2", tolerance=1e-4, outcome=single_then_sharded),
    Case(what="raylet of one of two nodes", tolerance=1e-4, outcome=node),
    Case(what="node after a warning", tolerance=1e-4, outcome=announced_node),
    Case(what="disk full, then worker", tolerance=0, outcome=disk),
)


def main() -> int:
    """Run all cases, or those whose names contain a word, and return 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="run only cases whose names contain this")
    word = parser.parse_args().word
    console = Console()
    claims: list[Claim] = []
    with TemporaryDirectory(prefix="kajiya-") as folder, ground(Path(folder)) as place:
        undisturbed = place.train(place.new_run("undisturbed"))
        for case in CASES:
            if word in case.what:
                console.print(f"{case.what} …", highlight=False)
                claims += _claims(case, case.outcome(place), undisturbed)
    print_claims(claims, console)
    return 0 if all(claim.is_met for claim in claims) else 1


def _claims(case: Case, outcome: Outcome, undisturbed: Outcome) -> tuple[Claim, ...]:
    pairs = zip(outcome.history, undisturbed.history, strict=False)
    difference = max(abs(a.losses[0] - b.losses[0]) for a, b in pairs)
    difference = max(difference, abs(outcome.after[0].loss - undisturbed.after[0].loss))
    wrong = sum(a.step != b for a, b in zip(outcome.history, range(1, NUM_STEPS + 1), strict=False))
    wrong += abs(len(outcome.history) - NUM_STEPS)
    return (
        Claim(what=case.what, measured=difference, bound=case.tolerance, direction="at most", unit="in a loss"),
        Claim(what=case.what, measured=wrong, bound=0, direction="at most", unit="steps lost or twice"),
    )


if __name__ == "__main__":
    sys.exit(main())
