"""Full fine-tuning in one process: equal to a plain torch loop, and kept as a model that loads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pack import adapter, job_of, pack_of
from tiny_models import tiny_llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from cluster.catalog import all_models, find
from cluster.home import kajiya_home
from cluster.manifest import DataSource, Manifest
from train_jobs.batches import DataOrder
from train_jobs.full_models import keep_model
from train_jobs.job import NO_ADAPTER, TrainJob
from train_jobs.sharding import write_trained
from train_jobs.step import train_step
from train_jobs.token_store import lengths_of


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    card = find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))
    return job_of(card, replace(adapter(1, lr=1e-3), spec=NO_ADAPTER), accumulation=2)


def plain_losses(job: TrainJob) -> list[float]:
    """Train all weights with torch's AdamW, one sample at a time."""
    (run,) = job.adapters
    model = AutoModelForCausalLM.from_pretrained(job.card.model_id)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, run.num_warmup_steps, run.num_steps)
    order = DataOrder(lengths=lengths_of(job.samples), batch_size=4, seed=run.seed)
    losses = []
    for step in range(run.num_steps):
        chosen = [job.samples[i] for i in order.batch(step)]
        total = torch.zeros(())
        for sample in chosen:
            logits = model(input_ids=torch.tensor([sample.input_ids])).logits
            targets = torch.tensor(sample.labels[1:])
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum")
        loss = total / sum(label != -100 for sample in chosen for label in sample.labels[1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, run.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_full_fine_tuning_equals_a_plain_loop_and_its_model_loads(job: TrainJob, tmp_path: Path) -> None:
    pack = pack_of(job)
    losses = [train_step(pack, {0: step}).losses[0] for step in range(pack.num_steps)]
    expected = plain_losses(job)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.05
    write_trained(pack, 0, tmp_path / "weights")
    source = DataSource(file="chats.jsonl", sha256="0", num_samples=11, num_trained_tokens=1)
    manifest = Manifest(
        model=job.card.name,
        name="whole",
        base_model_id=job.card.model_id,
        base_revision=None,
        base_fingerprint="0",
        precision="fp32",
        adapter={},
        plan={},
        data=source,
        metrics={},
        library_versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )
    folders = [keep_model(tmp_path / "weights", job.card, manifest) for _ in range(2)]
    home = kajiya_home() / "models" / "trained" / job.card.name / "whole"
    assert folders == [home / "v1", home / "v2"]
    assert sorted(path.name for path in home.iterdir()) == ["v1", "v2"]
    assert Manifest.model_validate_json((folders[1] / "manifest.json").read_text()).version == 2
    assert find(str(folders[0])).num_parameters() == job.card.num_parameters()
    name = f"{job.card.name}-whole-v2"
    assert find(name).model_id == str(folders[1])
    assert name in [card.name for card in all_models()]
    loaded = AutoModelForCausalLM.from_pretrained(folders[0])
    for name, weight in pack.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert AutoTokenizer.from_pretrained(folders[0]).chat_template


def test_lora_plus_moves_b_by_its_own_rate(job: TrainJob) -> None:
    plain, plus = adapter(1, lr=1e-3), replace(adapter(1, lr=1e-3), loraplus_lr_ratio=16.0)
    moved = []
    for run in (plain, plus):
        pack = pack_of(job_of(job.card, replace(run, num_warmup_steps=0, weight_decay=0.0)))
        start = [weight.detach().clone() for weight in pack.bank.parameters()]
        train_step(pack, {0: 0})
        steps = [(weight - old).abs().max().item() for weight, old in zip(pack.bank.parameters(), start, strict=True)]
        moved.append((max(steps[::2]), max(steps[1::2])))
    # Adam's first step is the rate, whatever the gradient; A rests, since B is zero.
    assert moved[0] == pytest.approx((0.0, 1e-3), rel=1e-3)
    assert moved[1] == pytest.approx((0.0, 16e-3), rel=1e-3)
