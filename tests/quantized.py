"""A quantized checkpoint by hand, in plain torch: rounding to the nearest, no calibration."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INT8_LEVELS = 63
"""Half of what int8 holds: without VNNI the product of AVX2 adds pairs of them in 16 bit and would saturate."""


def is_linear(name: str) -> bool:
    """Say whether `name` is the weight of a linear layer; the head of the models here is their embedding."""
    return name.endswith("_proj.weight")


def int8_folder(base: Path, folder: Path) -> Path:
    """Write the model in `base` with int8 weights, one scale per output row, as compressed-tensors' W8A8."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / INT8_LEVELS  # [out, 1]
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return write(base, folder, tensors, quantization)


def write(base: Path, folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    """Write a model folder beside the tokenizer of `base`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder
