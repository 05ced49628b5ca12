"""The thread of a worker that holds one base and trains the trials in its slots together.

K = slots.
"""

import importlib
import pickle
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from cluster.models.base import load_base
from train_jobs.evaluate import Evaluation, evaluate, held_out_loss
from train_jobs.job import AdapterJob, TrainJob
from train_jobs.pack import PackSize, build_pack
from train_jobs.step import train_step
from tune_spaces.arrivals import LATE_S, Arrivals
from tune_spaces.rounds import Rounds
from tune_spaces.shapes import Shape
from tune_spaces.trial import FileContent, Trial, TrialLeft, TrialReport, is_same_trial
from tune_spaces.trial_state import TrialState, put_state, take_state

Result = TypeVar("Result")
IDLE_S = 3600.0
GRACE_S = 0.5
"""How long others wait for a trial on which Ray Tune is deciding: full packs are worth it, a slow driver is not."""


class PackOwner:
    """One thread owns the pack. Other threads hand it what is to be done there, by `call`, and wait.

    That is done between two passes through the base. A trial for which nobody waits is in no pass: it is read beside
    one, by `call_beside`. Trials of one shape go together, those of another after them.
    """

    def __init__(
        self, job: TrainJob, size: PackSize, *, reduction_factor: int, jobs: Mapping[Shape, TrainJob] | None = None
    ) -> None:
        """Load the base; `jobs` are those of the shapes that trials may have beside the one of `job`."""
        self._job = job
        self._jobs = dict(jobs or {})
        self._size = size
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._trials: dict[str, Trial] = {}
        self._rounds = Rounds()
        self._arrivals = Arrivals(reduction_factor=reduction_factor)
        self._measured: Future[float] = Future()
        # One at a time: on its way to a file, the state of a large adapter is there several times. And with one thread:
        # OpenMP's threads wait for work without sleep, unless there are more of them than cores: who computes beside
        # the owner does it alone, or every pass from then on takes 1.4 times as long.
        self._desk = ThreadPoolExecutor(1, "desk", torch.set_num_threads, (1,))
        self._desk.submit(torch.get_num_threads).result()  # the next thread that sets it sets it for those after
        threading.Thread(target=self._own, daemon=True, name="pack").start()
        self.call(lambda: None)
        self._desk.submit(importlib.import_module, "peft")  # a second's work, which else the first checkpoint does

    @property
    def num_free(self) -> int:
        """Return how many more trials fit."""
        return self._size.num_slots - len(self._trials)

    def call(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Run `function` on the thread, between two passes, and return what it does; a method of this, above all."""
        return self._ask_for(function, *arguments, **named).result()

    def call_beside(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Run `function`, which is `checkpoint`, without waiting for the end of a pass."""
        return self._desk.submit(function, *arguments, **named).result()

    def measured_step_s(self) -> float:
        """Wait for a measured step and return its share for one trial; not for the thread itself."""
        return self._measured.result()

    def enter(
        self,
        trial_id: str,
        adapter: AdapterJob,
        state: TrialState | None,
        shape: Shape | None,
        instead_of: str | None,
    ) -> bool:
        """Give a trial a slot in place of the trial `instead_of`; False when there is none left.

        An entry of the same trial under another id goes: whoever made it has yet to notice that the trial moved on.
        """
        for before in [other for other in self._trials if other == instead_of or is_same_trial(other, trial_id)]:
            self.leave(before)
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

    def leave(self, trial_id: str) -> None:
        """Free the trial's slot; a trial that is not here is no problem."""
        if trial := self._trials.pop(trial_id, None):
            self._arrivals.drop(trial)
            self._pack.leave(trial.slot)
            # Else it would wait for ever, and with it whoever wants its process next.
            trial.fail(TrialLeft(f"Trial {trial_id} has left this worker."))

    def ask(self, trial_id: str, until: int, waiting: "Future[TrialReport]") -> None:
        """Let the trial make steps up to `until`, then tell `waiting` how it does."""
        trial = self._trials[trial_id]
        self._arrivals.hear(trial)
        trial.until, trial.waiting = until, waiting

    def state(self, trial_id: str) -> TrialState:
        """Return all that `enter` needs to go on with the trial elsewhere."""
        trial = self._trials[trial_id]
        return take_state(self._pack, trial.slot, done=trial.done)

    def checkpoint(self, trial_id: str, *, with_state: bool) -> tuple[dict[str, FileContent], FileContent | None]:
        """Return the trial's adapter as the files of PEFT's format, and its `state` as one if asked for."""
        trial = self._trials[trial_id]
        if with_state:  # else it ends: the next report waits until somebody has its place
            self._ask_for(self._arrivals.hear, trial)
        files = self._adapter_files(trial.slot)
        state = np.frombuffer(pickle.dumps(self.state(trial_id), protocol=5), np.uint8) if with_state else None
        if self._trials.get(trial_id) is not trial:  # it left meanwhile, and what was read may be another's
            raise TrialLeft(f"Trial {trial_id} has left this worker.")
        return files, state

    def evaluation(self, trial_id: str | None) -> Evaluation:
        """Return held-out loss and answers of a trial, or of the bare base."""
        return evaluate(self._pack, self._tokenizer, slot=self._trials[trial_id].slot if trial_id else None)

    def evaluation_of(self, files: Mapping[str, bytes]) -> Evaluation:
        """Return held-out loss and answers of an adapter in PEFT's format; needs a free slot."""
        return self._through(files, lambda slot: evaluate(self._pack, self._tokenizer, slot=slot))

    def held_out_loss_of(self, files: Mapping[str, bytes]) -> float:
        """Return the held-out loss alone of an adapter in PEFT's format; needs a free slot."""
        return self._through(files, lambda slot: held_out_loss(self._pack, slot=slot))

    def _ask_for(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> "Future[Result]":
        done: Future[Result] = Future()
        self._work.put((partial(function, *arguments, **named), done))
        return done

    def _own(self) -> None:
        try:
            self._load()
        except BaseException as error:
            while True:
                self._work.get()[1].set_exception(error)
        while True:
            self._do_work()
            self._make_a_pass()

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
        """Do what is asked for; wait while nothing trains, and for a moment for trials that are being decided on.

        Nobody's first step waits for more work to come.
        """
        is_first = True
        while is_first or not any(trial.is_new for trial in self._trials.values()):
            is_first = False
            self._arrivals.release()
            patience_s = self._patience_s()
            try:
                function, done = self._work.get(timeout=patience_s) if patience_s else self._work.get_nowait()
            except queue.Empty:
                return
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

    def _patience_s(self) -> float:
        trials = self._trials.values()
        if self._arrivals.is_measuring or any(trial.is_new for trial in trials):
            return 0
        if any(trial.is_training or trial.is_at_rung for trial in trials):
            return GRACE_S if any(trial.waiting is None for trial in trials) else 0
        return LATE_S if self._arrivals else IDLE_S

    def _make_a_pass(self) -> None:
        """Train newcomers; else measure those at their rung; else train the next ones of the round."""
        trials = self._trials.values()
        if new := self._rounds.newcomers(trials):
            self._train(new)
        elif self._arrivals.is_measuring:
            self._arrivals.measure(self._pack)
        elif others := self._rounds.next_pass(trials):
            self._train(others)
        else:
            self._arrivals.add([trial for trial in trials if trial.is_at_rung])
            step_s = self._rounds.end()
            if step_s is not None and not self._measured.done():
                self._measured.set_result(step_s)

    def _train(self, trials: Sequence[Trial]) -> None:
        """Make a step of `trials`, which are of one shape."""
        pack, by_slot = trials[0].pack, {trial.slot: trial for trial in trials}
        pack.take_turn()
        try:
            made = train_step(pack, {slot: trial.done for slot, trial in by_slot.items()})
        except (RuntimeError, ArithmeticError) as error:  # out of memory, above all
            for trial in trials:
                trial.fail(error)
            return
        for slot, loss in zip(made.slots, made.losses, strict=True):
            by_slot[slot].note(loss, num_tokens=made.num_tokens // len(trials), seconds=made.duration_s)
        self._rounds.note(trials, seconds=made.duration_s)

    def _adapter_files(self, slot: int) -> dict[str, FileContent]:
        card = self._job.card
        with tempfile.TemporaryDirectory() as name:
            self._pack.adapters.save_slot(
                slot, Path(name), base_model_name_or_path=card.model_id, revision=card.revision
            )
            return {path.name: np.fromfile(path, np.uint8) for path in Path(name).iterdir()}

    def _through(self, files: Mapping[str, bytes], measure: Callable[[int], Result]) -> Result:
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
