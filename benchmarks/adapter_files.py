"""Random adapters of the embedded model, registered as training would."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cluster.catalog import find
from cluster.manifest import DataSource, Manifest
from cluster.models.fingerprint import base_fingerprint
from cluster.registry import Registry

MODEL = "smollm2-135m-instruct"


def write_adapters(
    base: Path, home: Path, *, names: tuple[str, ...], r: int, target_modules: tuple[str, ...]
) -> dict[str, Path]:
    """Write one PEFT folder per name below `home`; weak enough that answers stay long, and no update is zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(target_modules))
    peft = get_peft_model(model, config)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        peft.save_pretrained(home / name)
    return {name: home / name for name in names}


def register(folders: dict[str, Path]) -> None:
    """Add each folder to the default registry under its name."""
    card, registry = find(MODEL), Registry.default()
    fingerprint = base_fingerprint(card)
    for name, folder in folders.items():
        manifest = Manifest(
            model=card.name,
            name=name,
            base_model_id=card.model_id,
            base_revision=card.revision,
            base_fingerprint=fingerprint,
            precision="fp32",
            adapter={},
            plan={},
            data=DataSource(file="random", sha256="0" * 64, num_samples=1, num_trained_tokens=1),
            metrics={},
            library_versions={},
            created_at="2026-01-01T00:00:00+00:00",
        )
        registry.add(folder, manifest)
