"""Continued pre-training on plain text, from the command to the registered adapter, beside a plain PEFT loop."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_pack import pack_of
from tiny_models import byte_tokenizer, tiny_base, tiny_llama_folder
from torch import nn
from transformers import get_linear_schedule_with_warmup

from cluster.registry import Registry
from train_jobs import loop
from train_jobs.batches import DataOrder
from train_jobs.finetune import main
from train_jobs.job import TrainJob
from train_jobs.loop import Outcome
from train_jobs.run_store import RunStore

TEXTS = [
    "吾輩は猫である。名前はまだ無い。",
    "親譲りの無鉄砲で小供の時から損ばかりしている。",
    "To be, or not to be",
    "Amen.",
]
HELD_OUT = ["山路を登りながら、こう考えた。", "智に働けば角が立つ。"]
MAX_LENGTH, BATCH_SIZE, NUM_STEPS = 20, 4, 24


def written(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    return str(path)


def pieces_of(texts: list[str]) -> list[list[int]]:
    """Return each text's tokens and its end, in pieces; one token alone has nothing to be predicted from."""
    tokenizer = byte_tokenizer()
    whole = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    pieces = [ids[start : start + MAX_LENGTH] for ids in whole for start in range(0, len(ids), MAX_LENGTH)]
    return [piece for piece in pieces if len(piece) > 1]


def mean_loss(model: nn.Module, pieces: list[list[int]]) -> torch.Tensor:
    """Return the mean over every token that has one before it, one piece at a time."""
    total = torch.zeros(())
    for piece in pieces:
        ids = torch.tensor(piece)
        total = total + nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
    return total / sum(len(piece) - 1 for piece in pieces)


def plain_losses(job: TrainJob, base: Path) -> list[float]:
    """Train with PEFT and torch, from the same start and in the same order."""
    (run,) = job.adapters
    targets = list(run.spec.target_modules)
    model = get_peft_model(tiny_base(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, layer in pack_of(job).adapters.layers.items():
        model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(layer.lora_A.data[0])
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, run.num_warmup_steps, NUM_STEPS)
    pieces = pieces_of(TEXTS)
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int32).numpy()
    order = DataOrder(lengths=lengths, batch_size=BATCH_SIZE, seed=run.seed)
    losses = []
    for step in range(NUM_STEPS):
        loss = mean_loss(model, [pieces[i] for i in order.batch(step)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_texts_are_trained_as_a_plain_loop_trains_them_and_the_adapter_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[TrainJob, Outcome]] = []

    def launch_here(job: TrainJob, run: RunStore, **_: object) -> Outcome:
        ran.append((job, loop.run(pack_of(job), byte_tokenizer(), run)))
        return ran[0][1]

    monkeypatch.setattr("train_jobs.launch.launch", launch_here)
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)
    base = tiny_llama_folder(tmp_path / "tiny-prose")
    words = ["--model", str(base), "--name", "prose", "--num-workers", "1", "--max-steps", str(NUM_STEPS)]
    words += ["--data", written(tmp_path / "a.jsonl", TEXTS), "--eval-data", written(tmp_path / "b.jsonl", HELD_OUT)]
    words += ["--max-length", str(MAX_LENGTH), "--method", "lora"]
    settings = ("r=4", "lora_dropout=0", "learning_rate=1e-2", "micro_batch_size=2", "gradient_accumulation_steps=2")
    assert main([*words, *(word for setting in settings for word in ("--set", setting))]) == 0

    ((job, outcome),) = ran
    expected = plain_losses(job, base)
    assert [step.losses[0] for step in outcome.history] == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.3
    version = Registry.default().resolve("tiny-prose", "prose")
    metrics = version.manifest.metrics
    with torch.no_grad():
        model = tiny_base(base)
        assert metrics["held_out_loss_before"] == pytest.approx(mean_loss(model, pieces_of(HELD_OUT)).item(), abs=1e-5)
        trained = PeftModel.from_pretrained(model, version.uri)
        assert metrics["held_out_loss_after"] == pytest.approx(mean_loss(trained, pieces_of(HELD_OUT)).item(), abs=1e-5)
    assert metrics["held_out_questions"] == 0
    assert version.manifest.data.num_trained_tokens == sum(len(piece) - 1 for piece in pieces_of(TEXTS))
