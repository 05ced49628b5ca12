"""A Ray Tune trial that is a Ray Train run of its own, where trials cannot share a base.

Each rung is one run: it goes on where the one before ended, and between them no GPU is held while
others are compared. What this costs, loading the base anew, most trials pay once, for they stop at their first rung.
"""

import json
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from train_jobs.launch import RunDiverged, launch
from train_jobs.loop import OUTCOME, Outcome, adapter_folder
from train_jobs.run_store import RunStore
from tune_spaces.shared import Shared
from tune_spaces.trial import DIVERGED_LOSS
from tune_spaces.trial_jobs import ADAPTER_FOLDER, size_metrics

OUTCOME_FILE = "outcome.pkl"


class LaunchedTrial(tune.Trainable):  # type: ignore[misc] # Ray's interface of a trial with checkpoints
    """Trains from rung to rung with several workers. One actor serves many trials in turn (`reuse_actors`)."""

    def setup(self, config: Mapping[str, Any], shared: Shared) -> None:
        """Begin a trial; nothing is loaded yet."""
        assert shared.launch is not None
        self._shared, self._launch = shared, shared.launch
        self.reset_config(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Begin another trial."""
        self._step = 0
        self._outcome: Outcome | None = None
        self._job = self._shared.job_with(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung and return the metrics."""
        until = next(rung for rung in self._shared.rungs if rung > self._step)
        try:
            self._outcome = self._run_until(until)
        except RunDiverged:
            return self._metrics(None, until) | {"done": True}
        begun, self._step = self._step, until
        return self._metrics(self._outcome, begun) | {"done": until >= self._shared.rungs[-1]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the adapter in PEFT's format and how it does; what a next run needs is in the folder of the runs."""
        if self._outcome is not None:
            folder = Path(checkpoint_dir)
            with tempfile.TemporaryDirectory() as cache:
                shutil.copytree(adapter_folder(self._store.result(Path(cache)), 0), folder / ADAPTER_FOLDER)
            (folder / OUTCOME_FILE).write_bytes(pickle.dumps((self._step, self._outcome)))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on where the checkpoint was written."""
        self._step, self._outcome = read_outcome(Path(checkpoint_dir))

    @property
    def _store(self) -> RunStore:
        return RunStore(root=str(self._launch.folder), run=str(self.trial_id))

    def _run_until(self, step: int) -> Outcome:
        store, launched = self._store, self._launch
        store.write_record(json.dumps(self.config).encode())
        kept = store.read_result()
        if kept is not None and OUTCOME.validate_json(kept).history[-1].step != step:
            store.delete_result()  # of the rung before
        job = replace(self._job, stop_step=step)
        return launch(job, store, num_workers=launched.num_workers, use_gpu=launched.use_gpu)

    def _metrics(self, outcome: Outcome | None, begun: int) -> dict[str, Any]:
        (adapter,) = self._job.adapters
        sizes = size_metrics(self._job.card, adapter, weight_bytes=self._shared.weight_bytes)
        if outcome is None:
            return sizes | {"step": begun, "held_out_loss": DIVERGED_LOSS, "training_loss": DIVERGED_LOSS}
        made = [step for step in outcome.history if step.step > begun]
        (after,) = outcome.after
        metrics = sizes | {
            "step": outcome.history[-1].step,
            "held_out_loss": min(after.loss, DIVERGED_LOSS),
            "training_loss": made[-1].losses[0],
            "losses": tuple(step.losses[0] for step in made),
            "num_tokens": sum(step.num_tokens for step in made),
            "train_s": sum(step.duration_s for step in made),
        }
        if self._shared.is_exact_match:
            metrics["exact_match"] = after.num_right / max(1, after.num_questions)
        return metrics


def read_outcome(checkpoint: Path) -> tuple[int, Outcome]:
    """Return the step and the outcome that a trial wrote into its checkpoint."""
    step, outcome = pickle.loads((checkpoint / OUTCOME_FILE).read_bytes())  # noqa: S301 (the search's own file)
    assert isinstance(outcome, Outcome)
    return int(step), outcome
