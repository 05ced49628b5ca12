"""A Ray actor that holds one base and trains the trials in its slots together.

K = slots.
"""

import pickle
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from cluster.models.base import load_base
from train_jobs.evaluate import Evaluation, evaluate, held_out_loss, held_out_losses
from train_jobs.job import AdapterJob, TrainJob
from train_jobs.pack import Pack, PackSize, build_pack
from train_jobs.step import train_step
from tune_spaces.halving import release_order
from tune_spaces.shapes import Shape
from tune_spaces.trial import DIVERGED_LOSS, Trial, TrialReport, is_same_trial
from tune_spaces.trial_state import TrialState, put_state, take_state

Result = TypeVar("Result")
IDLE_S = 3600.0
NUM_WARM_STEPS = 1
"""Steps that say little of the next ones: memory is taken and kernels are chosen."""
GRACE_S = 0.5
"""How long a step waits for trials on which Ray Tune is deciding: full packs are worth it, a slow driver is not."""


class TrialLeft(RuntimeError):
    """Steps were wanted for a trial that left meanwhile."""


class PackWorker:
    """One thread owns the pack; calls from trials hand it work and wait. Run it with a concurrency of 2 K + 2.

    Trials of one shape go through the base together, those of another shape after them.
    """

    def __init__(
        self, job: TrainJob, size: PackSize, *, reduction_factor: int, jobs: Mapping[Shape, TrainJob] | None = None
    ) -> None:
        """Load the base; `jobs` are those of the shapes that trials may have beside the one of `job`."""
        self._job = job
        self._jobs = dict(jobs or {})
        self._size = size
        self._reduction_factor = reduction_factor
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._trials: dict[str, Trial] = {}
        self._arrived: deque[tuple[Trial, TrialReport]] = deque()
        """Trials at their rung whose report has yet to be released."""
        self._released_s = 0.0
        self._measured: Future[float] = Future()
        self._num_made = 0
        threading.Thread(target=self._own, daemon=True, name="pack").start()
        self._call(lambda: None)

    def free_slots(self) -> int:
        """Return how many more trials fit."""
        return self._size.num_slots - len(self._trials)

    def enter(
        self,
        trial_id: str,
        adapter: AdapterJob,
        state: TrialState | bytes | None = None,
        *,
        shape: Shape | None = None,
    ) -> bool:
        """Give a trial a slot, from its start or from `state`, also a kept one; False when there is none left.

        `shape` is one of `jobs`; None is that of the worker's own job.

        An entry of the same trial under another id goes: whoever made it has yet to notice that the trial moved on.
        """
        begun = pickle.loads(state) if isinstance(state, bytes) else state  # noqa: S301 (the search's own)
        return self._call(lambda: self._enter(trial_id, adapter, begun, shape))

    def leave(self, trial_id: str) -> None:
        """Free the trial's slot; a trial that is not here is no problem."""
        self._call(lambda: self._leave(trial_id))

    def advance(self, trial_id: str, until: int) -> TrialReport:
        """Train the trial together with all others up to its step `until`, and return how it does."""
        waiting: Future[TrialReport] = Future()
        self._call(lambda: self._ask(trial_id, until, waiting))
        return waiting.result()

    def evaluation(self, trial_id: str | None) -> Evaluation:
        """Return held-out loss and answers of a trial, or of the bare base."""
        return self._call(
            lambda: evaluate(self._pack, self._tokenizer, slot=self._trials[trial_id].slot if trial_id else None)
        )

    def state(self, trial_id: str) -> TrialState:
        """Return all that `enter` needs to go on with the trial elsewhere."""
        return self._call(lambda: self._state(self._trials[trial_id]))

    def kept_state(self, trial_id: str) -> bytes:
        """Return `state` for a file: to read it takes torch and all of the model's code, which trials do without."""
        return pickle.dumps(self.state(trial_id))

    def adapter_files(self, trial_id: str) -> dict[str, bytes]:
        """Return the trial's adapter as the files of PEFT's format."""
        return self._call(lambda: self._adapter_files(self._trials[trial_id].slot))

    def evaluation_of(self, files: dict[str, bytes]) -> Evaluation:
        """Return held-out loss and answers of an adapter in PEFT's format; needs a free slot."""
        return self._call(lambda: self._through(files, lambda slot: evaluate(self._pack, self._tokenizer, slot=slot)))

    def held_out_loss_of(self, files: dict[str, bytes]) -> float:
        """Return the held-out loss alone of an adapter in PEFT's format; needs a free slot."""
        return self._call(lambda: self._through(files, lambda slot: held_out_loss(self._pack, slot=slot)))

    def measured_step_s(self) -> float:
        """Wait for a measured step and return its share for one trial."""
        return self._measured.result()

    def _through(self, files: dict[str, bytes], measure: Callable[[int], Result]) -> Result:
        slot = self._free_slots()[0]
        with tempfile.TemporaryDirectory() as name:
            for file, content in files.items():
                (Path(name) / file).write_bytes(content)
            self._pack.adapters.load_slot(slot, Path(name))
        try:
            return measure(slot)
        finally:
            self._pack.adapters.clear_slot(slot)

    def _free_slots(self) -> list[int]:
        taken = {trial.slot for trial in self._trials.values()}
        return [slot for slot in range(self._size.num_slots) if slot not in taken]

    def _call(self, function: Callable[[], Result]) -> Result:
        done: Future[Result] = Future()
        self._work.put((function, done))
        return done.result()

    def _own(self) -> None:
        try:
            self._load()
        except BaseException as error:
            while True:
                self._work.get()[1].set_exception(error)
        while True:
            self._do_work()
            self._release()
            self._round()

    def _load(self) -> None:
        torch.set_num_threads(self._job.num_threads)
        disable_progress_bar()
        job = self._job
        dtype = getattr(torch, job.compute_dtype)
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), gradient_accumulation_steps=job.gradient_accumulation_steps
        )
        base = load_base(job.card, precision=job.precision, compute_dtype=dtype, device=accelerator.device)
        self._tokenizer = base.tokenizer
        self._pack = build_pack(job, base.model, accelerator, size=self._size)
        self._packs = {shape: self._pack.with_batches_of(other) for shape, other in self._jobs.items()}

    def _do_work(self) -> None:
        """Do what is asked for; wait while nothing trains, and for a moment for trials that are being decided on."""
        patience_s = self._patience_s()
        while True:
            try:
                function, done = self._work.get(timeout=patience_s) if patience_s else self._work.get_nowait()
            except queue.Empty:
                return
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)
            self._release()
            patience_s = self._patience_s()

    def _patience_s(self) -> float | None:
        if any(trial.is_training for trial in self._trials.values()):
            return GRACE_S if self._is_deciding() else 0
        return GRACE_S if self._arrived else IDLE_S

    def _is_deciding(self) -> bool:
        return any(trial.waiting is None for trial in self._trials.values())

    def _release(self) -> None:
        """Let the next trial at its rung report, once the one before has got its answer or is late."""
        is_late = time.monotonic() - self._released_s > GRACE_S
        if self._arrived and (is_late or not self._is_deciding()):
            trial, report = self._arrived.popleft()
            waiting, trial.waiting = trial.waiting, None
            self._released_s = time.monotonic()
            if waiting is not None:
                waiting.set_result(report)

    def _round(self) -> None:
        """Make a step of every trial that waits for steps, one pass for each shape; those at their rung report."""
        training = [trial for trial in self._trials.values() if trial.is_training]
        begin_s = time.monotonic()
        arrived: list[Trial] = []
        for pack in (self._pack, *self._packs.values()):
            arrived += self._step(pack, {trial.slot: trial for trial in training if trial.pack is pack})
        if not training:
            return
        self._num_made += 1
        if self._num_made == NUM_WARM_STEPS + 1:
            self._measured.set_result((time.monotonic() - begin_s) / len(training))
        if arrived:
            self._arrive(arrived)

    def _step(self, pack: Pack, trials: Mapping[int, Trial]) -> list[Trial]:
        """Make a step of `trials`, by slot, and return those that are at their rung."""
        if not trials:
            return []
        pack.take_turn()
        try:
            made = train_step(pack, {slot: trial.done for slot, trial in trials.items()})
        except (RuntimeError, ArithmeticError) as error:  # out of memory, above all
            for trial in trials.values():
                waiting, trial.waiting = trial.waiting, None
                if waiting is not None:
                    waiting.set_exception(error)
            return []
        for slot, loss in zip(made.slots, made.losses, strict=True):
            trials[slot].note(loss, num_tokens=made.num_tokens // len(made.slots), seconds=made.duration_s)
        return [trials[slot] for slot in made.slots if trials[slot].is_at_rung]

    def _arrive(self, trials: Sequence[Trial]) -> None:
        sound = [trial for trial in trials if trial.losses[-1] < DIVERGED_LOSS]
        losses = dict(zip((t.slot for t in sound), held_out_losses(self._pack, [t.slot for t in sound]), strict=True))
        held_out = [min(losses.get(trial.slot, DIVERGED_LOSS), DIVERGED_LOSS) for trial in trials]
        for index in release_order(held_out, reduction_factor=self._reduction_factor):
            self._arrived.append((trials[index], trials[index].report(held_out[index])))

    def _enter(self, trial_id: str, adapter: AdapterJob, state: TrialState | None, shape: Shape | None) -> bool:
        for before in [other for other in self._trials if is_same_trial(other, trial_id)]:
            self._leave(before)
        free = self._free_slots()
        if not free:
            return False
        pack = self._pack if shape is None else self._packs[shape]
        pack.enter(free[0], adapter)
        trial = Trial(slot=free[0], pack=pack)
        if state is not None:
            put_state(self._pack, free[0], state)
            trial.done = state.done
        self._trials[trial_id] = trial
        return True

    def _leave(self, trial_id: str) -> None:
        if trial := self._trials.pop(trial_id, None):
            self._arrived = deque(entry for entry in self._arrived if entry[0] is not trial)
            self._pack.leave(trial.slot)
            if trial.waiting is not None:  # else it would wait for ever, and with it whoever wants its process next
                trial.waiting.set_exception(TrialLeft(f"Trial {trial_id} has left this worker."))

    def _ask(self, trial_id: str, until: int, waiting: "Future[TrialReport]") -> None:
        trial = self._trials[trial_id]
        trial.until, trial.waiting = until, waiting

    def _state(self, trial: Trial) -> TrialState:
        return take_state(self._pack, trial.slot, done=trial.done)

    def _adapter_files(self, slot: int) -> dict[str, bytes]:
        card = self._job.card
        with tempfile.TemporaryDirectory() as name:
            self._pack.adapters.save_slot(
                slot, Path(name), base_model_name_or_path=card.model_id, revision=card.revision
            )
            return {path.name: path.read_bytes() for path in Path(name).iterdir()}
