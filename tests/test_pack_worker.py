"""Trials that share one base: each equals its run alone, whoever else comes, goes or diverges."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pack import adapter, job_of, losses_of, pack_of
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard, Precision
from cluster.models.bank import AdapterBank
from cluster.models.base import load_base
from train_jobs import evaluate, loop
from train_jobs.job import AdapterJob, TrainJob
from train_jobs.pack import Pack, PackSize
from train_jobs.run_store import RunStore
from train_jobs.step import PackStep, train_step
from train_jobs.tokens import Sample
from tune_spaces import arrivals, pack_owner, rounds
from tune_spaces.pack_worker import PackWorker
from tune_spaces.shapes import Shape, job_of_shape
from tune_spaces.trial import DIVERGED_LOSS, Trial, TrialLeft, TrialReport, entry_of

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = ((2, 1, 99), (2, 3, 99), (4, 1, 9))
"""Samples in a micro batch, micro batches in a step, tokens of the longest sample."""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


def worker_of(card: ModelCard, *, num_slots: int, accumulation: int = 1, precision: Precision = "fp32") -> PackWorker:
    job = replace(job_of(card, accumulation=accumulation), adapters=(), precision=precision)
    size = PackSize(num_slots=num_slots, max_r=8, target_modules=LINEARS)
    return PackWorker(job, size, reduction_factor=2)


def alone(
    card: ModelCard, run: AdapterJob, folder: Path, *, accumulation: int, precision: Precision
) -> tuple[list[float], dict[int, float]]:
    """Return the losses of a run of `train_jobs`, and those on the held-out part after its steps 3 and 8."""
    job = job_of(card, run, accumulation=accumulation)
    return alone_with(replace(job, precision=precision, eval_steps=1), folder)


def alone_with(job: TrainJob, folder: Path) -> tuple[list[float], dict[int, float]]:
    """Return the losses of the job run by `train_jobs`, and those on the held-out part after each step."""
    store = RunStore(root=str(folder), run=f"alone-{job.adapters[0].seed}")
    store.write_record(b"{}")
    outcome = loop.run(pack_of(job), byte_tokenizer(), store)
    return [step.losses[0] for step in outcome.history], {look.step: look.loss for look in outcome.held_out}


@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("fp32", 3), ("nf4", 2)])
def test_trials_that_come_and_go_equal_their_runs_alone(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, accumulation: int
) -> None:
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    runs = [adapter(1, r=4), adapter(2, r=8, dropout=0.2, lr=3e-3), adapter(3, r=2, lr=3e-2, dropout=0.1), adapter(4)]
    solo = [alone(card, run, tmp_path, accumulation=accumulation, precision=precision) for run in runs]
    worker = worker_of(card, num_slots=3, accumulation=accumulation, precision=precision)

    def search(index: int) -> list[float]:
        name, run = f"trial-{index}", runs[index]
        assert worker.enter(name, run)
        losses: list[float] = []
        # the second trial is stopped at its first rung, as a scheduler does; the fourth takes its slot
        for until in (3,) if index == 1 else (3, 8):
            report = worker.advance(name, until)
            assert report.step == until
            assert report.held_out_loss == pytest.approx(solo[index][1][until], abs=1e-5)
            losses += report.losses
        if index == 1:
            worker.leave(name)
            return [*losses, *search(3)]
        return losses

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(search, range(3)))
    assert found[0] == pytest.approx(solo[0][0], abs=1e-5)
    assert found[1] == pytest.approx([*solo[1][0][:3], *solo[3][0]], abs=1e-5)
    assert found[2] == pytest.approx(solo[2][0], abs=1e-5)
    assert found[0][-1] < found[0][0] - 0.05, "it learned"


def test_trials_of_other_shapes_take_turns_on_one_base_and_equal_their_runs_alone(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    plain = job_of(card)
    shapes = [Shape(micro_batch_size=m, gradient_accumulation_steps=a, max_length=n) for m, a, n in SHAPES]
    cut = {n: tuple(Sample(input_ids=s.input_ids[:n], labels=s.labels[:n]) for s in plain.samples) for n in (9, 99)}
    jobs = {s: replace(job_of_shape(plain, s, cut, num_workers=1), adapters=()) for s in shapes}
    assert [job.batch_size for job in jobs.values()] == [2, 6, 4]
    size = PackSize(num_slots=3, max_r=8, target_modules=LINEARS)
    worker = PackWorker(replace(plain, adapters=()), size, reduction_factor=2, jobs=jobs)
    runs = [adapter(1, r=4), adapter(2, r=8, dropout=0.2), adapter(3, r=2, lr=3e-2)]
    for number, (run, shape) in enumerate(zip(runs, shapes, strict=True)):
        assert worker.enter(f"t{number}", run, shape=shape)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda number: worker.advance(f"t{number}", 8), range(3)))
    for run, shape, report in zip(runs, shapes, reports, strict=True):
        job = replace(jobs[shape], adapters=(run,), eval_steps=1)
        losses, looks = alone_with(job, tmp_path)
        assert report.losses == pytest.approx(losses, abs=1e-5)
        assert report.held_out_loss == pytest.approx(looks[8], abs=1e-5)


def test_who_comes_in_the_middle_of_a_round_goes_first_and_reports_with_all_who_arrive_in_it(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[int]] = []
    told: list[float] = []
    is_second_round = threading.Event()
    worker = worker_of(card, num_slots=4)

    def train(pack: Pack, steps: dict[int, int]) -> PackStep:
        if len(passes) == 3:
            is_second_round.set()
        # in the first pass until all three have asked for steps, in the fourth until one more has come and asked
        while num_asked() < {0: 3, 3: 4}.get(len(passes), 0):
            time.sleep(0.001)
        passes.append(sorted(steps))
        return train_step(pack, steps)

    def num_asked() -> int:
        trials = list(worker._owner._trials.values())
        return worker._owner._work.qsize() + sum(trial.waiting is not None for trial in trials)

    def tell(trial: Trial, report: TrialReport) -> None:
        told.append(report.held_out_loss)
        tell_them(trial, report)

    tell_them = Trial.tell
    monkeypatch.setattr(Trial, "tell", tell)
    monkeypatch.setattr(pack_owner, "train_step", train)
    for limit in ("PASS_TOKENS", "SHORT_PASS_TOKENS"):  # each trial goes by itself
        monkeypatch.setattr(rounds, limit, 1)
    monkeypatch.setattr(pack_owner, "GRACE_S", 30)
    monkeypatch.setattr(arrivals, "LATE_S", 30)

    def search(slot: int) -> None:
        if slot == 3:
            assert is_second_round.wait(30)
            assert worker.enter("3", adapter(3, lr=3e-2))
        worker.advance(str(slot), 1 if slot == 3 else 2)
        worker.leave(str(slot))

    for slot in range(3):
        assert worker.enter(str(slot), adapter(slot))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(search, range(4)))
    assert sorted(passes[:3]) == [[0], [1], [2]]
    assert passes[4] == [3], "in the middle of the second round"
    assert sorted(passes[3:]) == [[0], [1], [2], [3]]
    assert told == [sorted(told)[place] for place in (1, 0, 2, 3)], "the better half first, as release_order has it"


def test_who_ends_has_a_successor_at_work_before_the_next_one_reports(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "LATE_S", 30)
    worker = worker_of(card, num_slots=3)
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        assert worker.enter(name, adapter(number))
    with ThreadPoolExecutor(4) as pool:
        reports = {pool.submit(worker.advance, name, 2): name for name in names}

        def next_to_report() -> str:
            done = next(as_completed(reports, timeout=30))
            return reports.pop(done)

        ends = next_to_report()
        worker.checkpoint(ends, with_state=False)
        for _ in range(3):  # each would let another one report
            worker.leave("nobody")
        assert not any(report.done() for report in reports)
        assert worker.enter("d", adapter(3), instead_of=ends)
        goes_on = next_to_report()
        worker.checkpoint(goes_on, with_state=True)
        next_to_report()


def test_a_full_worker_takes_no_more_and_a_freed_slot_is_given_again(card: ModelCard) -> None:
    worker = worker_of(card, num_slots=1)
    assert worker.enter("a", adapter(1))
    assert not worker.enter("b", adapter(2))
    assert worker.free_slots() == 0
    worker.leave("a")
    worker.leave("a")
    assert worker.enter("b", adapter(2))
    assert worker.enter("c", adapter(3), instead_of="b")
    assert worker.advance("c", 1).step == 1


def test_a_trial_goes_on_in_another_worker_as_if_nothing_had_happened(card: ModelCard) -> None:
    run = adapter(5, r=4, dropout=0.1)
    first, second = worker_of(card, num_slots=2), worker_of(card, num_slots=2)
    first.enter("x", run)
    begun = first.advance("x", 4)
    second.enter("other", adapter(6))
    _, kept = first.checkpoint("x", with_state=True)
    second.enter("x", run, kept)
    ended = second.advance("x", 8)
    expected = [loss for (loss,) in losses_of(job_of(card, run))]
    assert [*begun.losses, *ended.losses] == pytest.approx(expected, abs=1e-5)


def test_who_gives_a_slot_back_late_takes_it_from_nobody(card: ModelCard) -> None:
    worker = worker_of(card, num_slots=1)
    before, after = entry_of("trial"), entry_of("trial")
    assert worker.enter(before, adapter(1))
    worker.advance(before, 2)
    assert worker.enter(after, adapter(1), worker.state(before))
    worker.leave(before)
    assert worker.advance(after, 4).step == 4
    assert not worker.enter(entry_of("trial-2"), adapter(2))


def test_who_waits_for_a_trial_that_moved_on_is_told_so(card: ModelCard) -> None:
    worker = worker_of(card, num_slots=2)
    before, after = entry_of("trial"), entry_of("trial")
    assert worker.enter(before, adapter(1, steps=10_000))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker.advance, before, 10_000)
        while worker.state(before).done == 0:
            time.sleep(0.01)
        assert worker.enter(after, adapter(1))
        with pytest.raises(TrialLeft, match="has left this worker"):
            waiting.result(timeout=60)


def test_a_trial_that_diverges_ends_at_once_and_disturbs_nobody(card: ModelCard) -> None:
    calm, hot = adapter(1), replace(adapter(2, lr=1e30), num_warmup_steps=0, max_grad_norm=1e30)
    worker = worker_of(card, num_slots=2)
    worker.enter("calm", calm)
    worker.enter("hot", hot)
    with ThreadPoolExecutor(2) as pool:
        calm_report, hot_report = pool.map(lambda name: worker.advance(name, 8), ("calm", "hot"))
    assert hot_report.held_out_loss == DIVERGED_LOSS
    assert hot_report.step < 8
    expected = [loss for (loss,) in losses_of(job_of(card, calm))]
    assert calm_report.losses == pytest.approx(expected, abs=1e-5)


def test_what_a_worker_gives_back_is_a_peft_adapter(card: ModelCard, tmp_path: Path) -> None:
    worker = worker_of(card, num_slots=1)
    worker.enter("a", adapter(1, r=4))
    worker.advance("a", 2)
    files, state = worker.checkpoint("a", with_state=False)
    assert state is None
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.data)
    bank = AdapterBank(load_base(card, precision="fp32").model, num_slots=1, max_r=4, target_modules=LINEARS)
    assert bank.load_slot(0, tmp_path).r == 4


def test_a_base_that_cannot_be_loaded_is_told_to_whoever_asks(card: ModelCard, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="absent"):
        worker_of(replace(card, model_id=str(tmp_path / "absent")), num_slots=1)


def test_who_waits_is_told_when_held_out_samples_do_not_fit_into_memory(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    worker = worker_of(card, num_slots=1)
    monkeypatch.setattr(evaluate, "_sums", fail)
    assert worker.enter("a", adapter(1))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        worker.advance("a", 2)
    monkeypatch.undo()
    assert worker.enter("b", adapter(1), instead_of="a")
    assert worker.advance("b", 2).step == 2


def test_a_trial_imports_nothing_that_only_its_worker_needs() -> None:
    # It unpickles what all trials have in common, the workers' handles with it, which bring the module of their class.
    modules = "tune_spaces.packed_trial, tune_spaces.pack_worker, train_jobs.token_store"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
