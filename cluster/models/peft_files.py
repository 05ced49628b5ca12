"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from cluster.errors import UserError
from cluster.models.adapter_spec import AdapterSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

# What changes nothing about how a finished adapter computes: where it came from, how it was started, how PEFT loads.
_HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    ]
)
# These starts leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it (PEFT, `init_lora_weights`).
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class AdapterFilesError(UserError, ValueError):
    """An adapter folder that is broken, or asks for what Kajiya cannot do."""


class _LoraConfigFile(BaseModel):
    """The fields of `adapter_config.json` that we act on; every other one must be neutral."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: int
    target_modules: list[str] = Field(min_length=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True


def read_spec(folder: Path) -> AdapterSpec:
    """Return what `adapter_config.json` in `folder` says.

    Raises:
        AdapterFilesError: The file is missing, malformed, or has a field that we cannot represent.
    """
    path = folder / CONFIG_FILE
    try:
        config = _LoraConfigFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise AdapterFilesError(f"{path}: cannot read it ({error.strerror}); is {folder} an adapter folder?") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise AdapterFilesError(f"{path}: {field}: {first['msg']}") from None
    _refuse_the_rest(path, config)
    return AdapterSpec(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=tuple(sorted(config.target_modules)),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
    )


def _refuse_the_rest(path: Path, config: _LoraConfigFile) -> None:
    wrong = {name: value for name, value in (config.model_extra or {}).items() if value and name not in _HARMLESS}
    if config.peft_type != "LORA":
        wrong["peft_type"] = config.peft_type
    if config.bias != "none":
        wrong["bias"] = config.bias
    if config.init_lora_weights not in _PLAIN_STARTS:
        wrong["init_lora_weights"] = config.init_lora_weights
    if wrong:
        fields = ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(wrong.items()))
        raise AdapterFilesError(f"{path}: not supported: {fields}; only plain LoRA on linear layers is")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of `folder`, keyed `LAYER.lora_A.weight` [r, d_in] and `LAYER.lora_B.weight` [d_out, r].

    Raises:
        AdapterFilesError: The file is missing, truncated, or has tensors that are no LoRA weights of a linear layer.
    """
    path = folder / WEIGHTS_FILE
    try:
        # Read, not mapped: a mapped file that is cut short later kills the process instead of raising.
        tensors: dict[str, torch.Tensor] = load(path.read_bytes())
    except OSError as error:
        raise AdapterFilesError(f"{path}: cannot read it ({error.strerror})") from None
    except SafetensorError as error:
        raise AdapterFilesError(f"{path}: no safetensors file, or a broken one ({error})") from None
    for key in tensors:
        if not (key.startswith(KEY_PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise AdapterFilesError(f"{path}: not supported: tensor {key}; only LoRA weights of linear layers are")
    return {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}


def write_adapter(
    folder: Path,
    spec: AdapterSpec,
    weights: Mapping[str, torch.Tensor],
    *,
    base_model_name_or_path: str,
    revision: str | None,
    fan_in_fan_out: bool,
) -> None:
    """Write `weights`, keyed as `read_weights` returns them, as a folder that `PeftModel.from_pretrained` loads."""
    from peft import LoraConfig  # here, since serving replicas never write and PEFT takes a second to import

    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=list(spec.target_modules),
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
    )
    # PEFT keeps a set, whose order changes from process to process: equal adapters should be equal files.
    config.target_modules = sorted(spec.target_modules)
    config.save_pretrained(str(folder))
    tensors: dict[str, Any] = {f"{KEY_PREFIX}{key}": tensor.contiguous() for key, tensor in sorted(weights.items())}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
