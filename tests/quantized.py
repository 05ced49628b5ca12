"""Quantized checkpoints by hand, in plain torch: rounding to the nearest, no calibration."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INT8_LEVELS = 127


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


def gptq_folder(base: Path, folder: Path, *, group_size: int = 32) -> Path:
    """Write the model in `base` with symmetric 4-bit weights, one scale per `group_size` inputs, as GPTQ stores them.

    GPTQ's files without GPTQ's search (arXiv:2210.17323): each weight goes to its nearest level.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        layer = name.removesuffix(".weight")
        groups = weight.reshape(len(weight), -1, group_size)  # [out, groups, group_size]
        scales = (groups.abs().amax(-1) / 7).clamp(min=1e-8)
        levels = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).flatten(1).to(torch.int64)
        zeros = torch.full_like(scales, 7, dtype=torch.int64)  # the file holds the zero point less one
        tensors[f"{layer}.qweight"] = pack(levels.T, dim=0)  # [in / 8, out]
        tensors[f"{layer}.scales"] = scales.T.contiguous()  # [groups, out]
        tensors[f"{layer}.qzeros"] = pack(zeros.T, dim=1)  # [groups, out / 8]
        tensors[f"{layer}.g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // group_size
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    return write(base, folder, tensors, quantization)


def awq_folder(base: Path, folder: Path, *, group_size: int = 32) -> Path:
    """Write the same 4-bit weights as AWQ stores them (arXiv:2306.00978), without its search for scales."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not is_linear(name):
            tensors[name] = weight
            continue
        layer = name.removesuffix(".weight")
        levels, scales, zeros = four_bit(weight, group_size)
        tensors[f"{layer}.qweight"] = pack(interleave(levels.T, order), dim=1)  # [in, out / 8]
        tensors[f"{layer}.scales"] = scales.T.contiguous()
        tensors[f"{layer}.qzeros"] = pack(interleave(zeros.T, order), dim=1)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return write(base, folder, tensors, quantization)


def four_bit(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return levels [out, in] in 0..15, scales and zero points [out, groups] with weight = (level - zero) x scale."""
    groups = weight.reshape(len(weight), -1, group_size)  # [out, groups, group_size]
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-8)
    zeros = (-low / scales).round().clamp(0, 15)
    levels = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return levels.flatten(1).to(torch.int64), scales, zeros.to(torch.int64)


def pack(levels: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Return eight 4-bit values per int32 along `dim`, the first in the lowest bits."""
    groups = levels.reshape(*levels.shape[:dim], -1, 8, *levels.shape[dim + 1 :])
    shifts = torch.arange(0, 32, 4).reshape([-1 if i == dim + 1 else 1 for i in range(3)])
    packed = (groups << shifts).sum(dim + 1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def interleave(levels: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Return `levels` [rows, columns] with each eight columns in `order`."""
    return levels.reshape(len(levels), -1, 8)[:, :, order].flatten(1)


def write(base: Path, folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    """Write a model folder beside the tokenizer of `base`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder
