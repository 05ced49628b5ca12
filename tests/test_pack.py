"""Training steps of a pack: equal to a few-line PEFT loop, and to each adapter's run alone."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama_folder
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from cluster.catalog import find
from cluster.model_card import ModelCard, Precision
from cluster.models.adapter_spec import AdapterSpec
from cluster.models.base import load_base
from train_jobs.batches import DataOrder
from train_jobs.evaluate import held_out_loss
from train_jobs.job import AdapterJob, TrainJob
from train_jobs.pack import Pack, build_pack
from train_jobs.step import train_step
from train_jobs.token_store import lengths_of
from train_jobs.tokens import Sample

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


def samples(count: int) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(count):
        ids = tuple(torch.randint(2, 258, (6 + 3 * (i % 5),), generator=generator).tolist())
        made.append(Sample(input_ids=ids, labels=(-100,) * (3 + i % 2) + ids[3 + i % 2 :]))
    return tuple(made)


def adapter(seed: int, *, r: int = 4, lr: float = 1e-2, dropout: float = 0.0, steps: int = 8) -> AdapterJob:
    return AdapterJob(
        spec=AdapterSpec(r=r, lora_alpha=2 * r, target_modules=LINEARS, lora_dropout=dropout),
        seed=seed,
        num_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="linear",
        num_warmup_steps=2,
        weight_decay=0.1 * seed,
        max_grad_norm=1.0 / (1 + seed),
    )


def job_of(card: ModelCard, *adapters: AdapterJob, accumulation: int = 1, checkpointing: bool = False) -> TrainJob:
    return TrainJob(
        card=card,
        precision="fp32",
        compute_dtype="float32",
        adapters=adapters,
        samples=samples(11),
        held_out=samples(3),
        questions=(),
        batch_size=4,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        deepspeed_zero=None,
        checkpoint_steps=100,
        num_threads=1,
    )


def pack_of(job: TrainJob) -> Pack:
    model = load_base(job.card, precision=job.precision).model
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.gradient_accumulation_steps)
    return build_pack(job, model, accelerator)


def losses_of(job: TrainJob) -> list[tuple[float, ...]]:
    pack = pack_of(job)
    return [train_step(pack, running(pack, step)).losses for step in range(pack.num_steps)]


def running(pack: Pack, step: int) -> dict[int, int]:
    return {slot: step for slot, run in pack.runs.items() if step < run.job.num_steps}


def peft_losses(job: TrainJob) -> list[float]:
    """Train the job's one adapter with PEFT and torch, from the bank's starting weights, one sample at a time."""
    (run,) = job.adapters
    start = pack_of(job).adapters
    config = LoraConfig(r=run.spec.r, lora_alpha=run.spec.lora_alpha, target_modules=list(LINEARS))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(job.card.model_id), config)
    for name, layer in start.layers.items():
        theirs = model.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A.data[0])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, run.num_warmup_steps, run.num_steps)
    order = DataOrder(lengths=lengths_of(job.samples), batch_size=4, seed=run.seed)
    losses = []
    for step in range(run.num_steps):
        chosen = [job.samples[i] for i in order.batch(step)]
        total = torch.zeros(())
        for sample in chosen:
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            logits = model(input_ids=ids).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        loss = total / sum(label != -100 for sample in chosen for label in sample.labels[1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, run.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_pack_of_one_equals_a_plain_peft_loop(card: ModelCard, accumulation: int) -> None:
    job = job_of(card, adapter(1), accumulation=accumulation)
    expected = peft_losses(job)
    assert [loss for (loss,) in losses_of(job)] == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.05


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_each_adapter_of_a_pack_equals_its_run_alone(card: ModelCard, precision: Precision) -> None:
    runs = [
        adapter(1, r=4),
        adapter(2, r=8, lr=3e-3, dropout=0.2, steps=5),
        adapter(3, r=2, lr=3e-2, dropout=0.1, steps=7),
    ]
    jobs = [replace(job_of(card, *pack, accumulation=2), precision=precision) for pack in (runs, *([r] for r in runs))]
    together, *alone = [losses_of(job) for job in jobs]
    for step, losses in enumerate(together):
        expected = [alone[k][step][0] for k, run in enumerate(runs) if step < run.num_steps]
        assert losses == pytest.approx(expected, abs=1e-5)
    assert [len(losses) for losses in together] == [3, 3, 3, 3, 3, 2, 2, 1]


def test_the_same_seed_gives_the_same_losses_to_the_bit(card: ModelCard) -> None:
    job = job_of(card, adapter(1, dropout=0.1))
    assert losses_of(job) == losses_of(job)
    assert losses_of(job) != losses_of(replace(job, adapters=(adapter(2, dropout=0.1),)))


def test_accumulation_and_checkpointing_change_nothing(card: ModelCard) -> None:
    run = adapter(1, dropout=0.1)
    expected = [loss for (loss,) in losses_of(job_of(card, run))]
    for job in (job_of(card, run, accumulation=4), job_of(card, run, checkpointing=True)):
        assert [loss for (loss,) in losses_of(job)] == pytest.approx(expected, abs=1e-5)


def test_an_adapter_that_enters_later_equals_its_run_alone_and_one_that_left_disturbs_nobody(card: ModelCard) -> None:
    first, second, late = adapter(1, r=4), adapter(2, r=8, dropout=0.2), adapter(3, r=2, lr=3e-2, dropout=0.1)
    alone = {run.seed: [loss for (loss,) in losses_of(job_of(card, run))] for run in (first, second, late)}
    pack = pack_of(job_of(card, first, second))
    losses: dict[int, list[float]] = {run.seed: [] for run in (first, second, late)}
    done = {0: 0, 1: 0}
    for number in range(11):
        if number == 3:  # stopped early, and another takes its slot without anything being loaded
            pack.leave(1)
            pack.enter(1, late)
            done[1] = 0
        steps = {slot: done[slot] for slot, run in pack.runs.items() if done[slot] < run.job.num_steps}
        made = train_step(pack, steps)
        for slot, loss in zip(made.slots, made.losses, strict=True):
            losses[pack.runs[slot].job.seed].append(loss)
            done[slot] += 1
    assert losses[1] == pytest.approx(alone[1], abs=1e-5)
    assert losses[2] == pytest.approx(alone[2][:3], abs=1e-5)
    assert losses[3] == pytest.approx(alone[3], abs=1e-5)
    assert len(losses[3]) == 8


def test_data_parallel_runs_the_module_itself_on_a_cpu(card: ModelCard) -> None:
    job = job_of(card, adapter(1, dropout=0.1), accumulation=2)
    parallel = replace(job, strategy="dp")
    assert isinstance(pack_of(parallel).module, torch.nn.DataParallel)
    assert losses_of(parallel) == losses_of(job)


def test_what_samples_have_in_common_has_the_same_dropout_however_a_batch_is_cut(card: ModelCard) -> None:
    opening = tuple(range(20, 30))
    begun = tuple(Sample(input_ids=opening + s.input_ids, labels=(-100,) * 10 + s.labels) for s in samples(11))
    found = {}
    for accumulation in (1, 2):
        job = replace(job_of(card, adapter(1, dropout=0.3), accumulation=accumulation), samples=begun)
        pack = pack_of(job)
        assert pack.opening == opening
        found[accumulation] = [train_step(pack, running(pack, step)).losses[0] for step in range(4)]
    assert found[1] == pytest.approx(found[2], abs=1e-5)


def test_a_batch_in_short_passes_has_the_losses_and_norms_of_one_pass(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limit in (512, 20):  # of a batch that has more than 20 tokens
        monkeypatch.setattr("cluster.activations.CPU_PASS_TOKENS", limit)
        pack = pack_of(job_of(card, adapter(1, dropout=0.3)))
        calls: list[int] = []
        pack.module.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023 -- called within its round
        made = train_step(pack, {0: 0})
        assert (len(calls) == 1) == (limit == 512)
        found.append([*made.losses, *made.grad_norms])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_long_rows_are_evaluated_few_at_a_time(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_of(job_of(card, adapter(1)))
    passes: list[int] = []
    pack.loss.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].input_ids.shape[1]))
    whole = held_out_loss(pack, slot=0)
    monkeypatch.setattr("train_jobs.evaluate.EVALUATION_TOKENS", 20)
    assert held_out_loss(pack, slot=0) == pytest.approx(whole, abs=1e-6)
    assert passes == [6 + 9 + 12, 6 + 9, 12]
