"""The training loop in one process: what it keeps, where it goes on, and when it ends."""

import errno
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pack import adapter, job_of, pack_of
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.store import FolderStore
from train_jobs import loop
from train_jobs.job import TrainJob
from train_jobs.loop import Outcome, Preempted, ResultNotKept, adapter_folder
from train_jobs.pack import Pack
from train_jobs.run_store import RunStore
from train_jobs.step import PackStep, train_step


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    card = find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))
    return replace(job_of(card, adapter(1, dropout=0.1, steps=8)), checkpoint_steps=3)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    made = RunStore(root=str(tmp_path / "runs"), run="test")
    made.write_record(b"{}")
    return made


@pytest.fixture(autouse=True)
def no_node_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)


def run(job: TrainJob, store: RunStore) -> Outcome:
    return loop.run(pack_of(job), byte_tokenizer(), store)


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process in the midst of `step`, counting from 1."""

    def steps_until(pack: Pack, steps: dict[int, int]) -> PackStep:
        if max(steps.values()) + 1 == step:
            raise Killed
        return train_step(pack, steps)

    monkeypatch.setattr(loop, "train_step", steps_until)


def losses(outcome: Outcome) -> list[float]:
    return [step.losses[0] for step in outcome.history]


def weights(store: RunStore, tmp_path: Path) -> bytes:
    return (adapter_folder(store.result(tmp_path), 0) / "adapter_model.safetensors").read_bytes()


def test_a_run_that_dies_goes_on_to_the_same_bits(
    job: TrainJob, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = RunStore(root=store.root, run="undisturbed")
    expected = run(job, undisturbed)
    for step in (2, 5, 8):  # before the first checkpoint, between two, and after the last
        with monkeypatch.context() as patch:
            die_at(step, patch)
            with pytest.raises(Killed):
                run(job, store)
    outcome = run(job, store)
    assert losses(outcome) == losses(expected)
    assert [step.step for step in outcome.history] == list(range(1, 9))
    assert outcome.after == expected.after
    assert weights(store, tmp_path / "a") == weights(undisturbed, tmp_path / "b")
    assert store.steps() == [3, 6]


def sigterm_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the process SIGTERM in the midst of `step`, counting from 1."""

    def steps(pack: Pack, steps: dict[int, int]) -> PackStep:
        if max(steps.values()) + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):  # the main thread sees it when it runs Python
                time.sleep(0.001)
        return train_step(pack, steps)

    monkeypatch.setattr(loop, "train_step", steps)


@pytest.mark.parametrize("is_thread", [False, True])
def test_a_worker_that_gets_sigterm_keeps_the_step_in_hand(
    job: TrainJob, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_thread: bool
) -> None:
    undisturbed = RunStore(root=store.root, run="undisturbed")
    expected = run(job, undisturbed)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
        sigterm_at(5, patch)
        with pytest.raises(Preempted, match="after step 5 is kept"):
            # Ray Train trains in a thread, and Python's handlers run in the main one.
            wait_for(pool.submit(run, job, store)) if is_thread else run(job, store)
    time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert store.steps() == [3, 5]
    outcome = run(job, store)
    assert losses(outcome) == losses(expected)
    assert weights(store, tmp_path / "a") == weights(undisturbed, tmp_path / "b")


def wait_for(future: Future[Outcome]) -> Outcome:
    """Wait as Ray's main thread does, which comes back to Python now and then."""
    while not future.done():
        time.sleep(0.01)
    return future.result()


@pytest.mark.parametrize("damage", ["cut", "record cut", "gone"])
def test_an_unreadable_checkpoint_is_passed_over(
    damage: str, job: TrainJob, store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        die_at(8, patch)
        with pytest.raises(Killed):
            run(job, store)
    folder = Path(store.root) / "test" / "checkpoints" / "s00000006"
    victim = folder / ("record.json" if damage == "record cut" else "state.pt")
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-7])
    capsys.readouterr()
    outcome = run(job, store)
    said = capsys.readouterr().out
    assert "The checkpoint after step 6" in said
    assert "step 4/8" in said
    assert "step 3/8" not in said
    assert len(outcome.history) == 8
    run(job, store)
    assert "unreadable" not in capsys.readouterr().out  # it was written anew


def test_a_full_disk_costs_checkpoints_not_the_run(
    job: TrainJob, store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("cluster.store.fs.copy_files", fill)
        with pytest.raises(ResultNotKept, match=r"cannot be written to .*test \(No space left on device\)"):
            run(job, store)
    said = capsys.readouterr().out
    assert said.count("No checkpoint after step") == 2 * 2  # once for people, once for programs
    assert "it begins again after step 0" in said
    assert store.steps() == []
    assert store.read_result() is None
    assert [p for p in (Path(store.root) / "test").rglob("*") if p.is_file()] == [Path(store.root, "test/record.json")]
    assert len(run(job, store).history) == 8


def test_torchs_own_word_for_a_full_disk_counts_too(
    job: TrainJob, store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", fill)
    assert len(run(job, store).history) == 8
    assert "PytorchStreamWriter failed" in capsys.readouterr().out


def test_the_best_weights_on_the_held_out_part_are_the_result(
    job: TrainJob, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rate at which the loss swings makes the last step other than the best.
    (small,) = job.adapters
    swinging = replace(job, adapters=(replace(small, learning_rate=0.3, num_steps=12),), eval_steps=2)
    outcome = run(swinging, store)
    assert [look.step for look in outcome.held_out] == [2, 4, 6, 8, 10, 12]
    lowest = min(outcome.held_out, key=lambda look: look.loss)
    assert lowest.step < 12
    assert outcome.best == lowest
    assert outcome.after[0].loss == pytest.approx(lowest.loss, rel=1e-6)
    assert lowest.step in store.steps()
    shorter = RunStore(root=store.root, run="shorter")
    monkeypatch.setattr(Pack, "num_steps", lowest.step)
    run(replace(swinging, eval_steps=None), shorter)
    assert weights(store, tmp_path / "a") == weights(shorter, tmp_path / "b")


def test_a_run_that_no_longer_learns_ends_early(job: TrainJob, store: RunStore) -> None:
    (small,) = job.adapters
    swinging = replace(
        job,
        adapters=(replace(small, learning_rate=0.3, num_steps=40),),
        eval_steps=2,
        early_stopping_patience=2,
    )
    outcome = run(swinging, store)
    looks = [look.loss for look in outcome.held_out]
    assert len(outcome.history) == 2 * len(looks) < 40
    best = looks.index(min(looks))
    assert len(looks) - 1 - best == 2
    assert all(later >= looks[best] for later in looks[best:])
    assert outcome.best is not None
    assert outcome.best.step == 2 * (best + 1)


def test_what_there_is_is_kept_once_before_a_node_leaves(
    job: TrainJob, store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings = iter([None, None, None, "leaving"])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(warnings))
    written: list[str] = []
    publish = FolderStore.publish

    def watch(self: FolderStore, folder: Path, path: str, last_file: tuple[str, bytes]) -> bool:
        written.append(path.rpartition("/")[2])
        return publish(self, folder, path, last_file)

    monkeypatch.setattr(FolderStore, "publish", watch)
    run(job, store)
    assert written == ["s00000003", "s00000004", "s00000006", "result"]
    assert "A node is about to leave; what there is after step 4 is kept" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_losses_and_another_one_others(job: TrainJob, store: RunStore) -> None:
    (small,) = job.adapters
    jobs = [job, job, replace(job, adapters=(replace(small, seed=7),))]
    runs = [losses(run(one, replace(store, run=f"seed-{i}"))) for i, one in enumerate(jobs)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[1], runs[2], strict=True))
