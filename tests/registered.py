"""Manifests and adapters to register, for tests."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cluster.manifest import DataSource, Manifest
from cluster.model_card import ModelCard
from cluster.models.fingerprint import base_fingerprint


def manifest_of(card: ModelCard, name: str = "shop", *, data_sha256: str = "0" * 64) -> Manifest:
    """Return what training on `card` would write."""
    return Manifest(
        model=card.name,
        name=name,
        base_model_id=card.model_id,
        base_revision=None,
        base_fingerprint=base_fingerprint(card),
        precision="fp32",
        adapter={},
        plan={},
        data=DataSource(file="x.jsonl", sha256=data_sha256, num_samples=1, num_trained_tokens=1),
        metrics={},
        library_versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )


def plain_manifest(name: str = "shop") -> Manifest:
    """Return a manifest of a model `tiny` that is nowhere."""
    return Manifest(
        model="tiny",
        name=name,
        base_model_id="org/tiny",
        base_revision=None,
        base_fingerprint="ab12",
        precision="fp32",
        adapter={"r": 8},
        plan={},
        data=DataSource(file="train.jsonl", sha256="0" * 64, num_samples=3, num_trained_tokens=30),
        metrics={"held_out_loss_after": 0.5},
        library_versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )


def peft_folder(
    base: Path, folder: Path, *, seed: int, r: int = 4, target_modules: Sequence[str] = ("q_proj", "v_proj", "up_proj")
) -> Path:
    """Write an adapter that changes the answers of the model in `base`, and return its folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(target_modules)))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    peft.save_pretrained(folder)
    return folder
