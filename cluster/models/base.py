"""Load a base model at the precision its plan asks for."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from cluster.hub import ensure_available, is_embedded
from cluster.model_card import ModelCard, Precision
from cluster.models.embedded import embedded_folder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBase:
    """A base model in memory, ready to be frozen, and the tokenizer with its chat template."""

    card: ModelCard
    precision: Precision
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(
    card: ModelCard,
    *,
    precision: Precision,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> LoadedBase:
    """Return the model and tokenizer of `card` on `device`.

    `compute_dtype` is the precision of everything that is not quantized (embeddings, norms, `lm_head`, activations)
    under `int8` and `nf4`; by default float32 on a CPU, where 16-bit products are slow, and bfloat16 on a GPU.

    Raises:
        ModelUnavailable: the files are not here and the hub does not give them.
    """
    ensure_available(card)
    on_cpu = torch.device(device).type == "cpu"
    dtype = DTYPES.get(precision) or compute_dtype or (torch.float32 if on_cpu else torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        source_of(card),
        config=load_config(card),
        dtype=dtype,
        # Under ZeRO-3 DeepSpeed shards each parameter while it is loaded, and places it by itself.
        device_map=None if is_deepspeed_zero3_enabled() else {"": device},
        quantization_config=_quantization(precision, dtype),
        attn_implementation=attn_implementation,
        **_hub_kwargs(card),
    )
    if precision == "nf4":
        _keep_compute_type(model)
    if on_cpu and precision in ("int8", "nf4"):
        _let_go_of_files(model)
    return LoadedBase(card=card, precision=precision, model=model.eval(), tokenizer=load_tokenizer(card))


def _keep_compute_type(model: PreTrainedModel) -> None:
    """Let 4-bit layers compute in the type they were loaded for, on every CPU.

    On one with AVX512-BF16, bitsandbytes packs a layer's weights anew at its first pass without gradients, and from
    then on computes in bfloat16, whatever was asked for, and without gradients: an evaluation would end training.
    """
    from bitsandbytes.nn import Linear4bit  # a second's work, which other precisions do without

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what was not quantized out of the files, which else stay in memory whole for the sake of these few."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (torch.nn.Parameter, torch.Tensor):
            tensor.data = tensor.data.clone()


def load_tokenizer(card: ModelCard) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `card`; where it brings no chat template, the catalog's is put in."""
    tokenizer = AutoTokenizer.from_pretrained(source_of(card), **dict(card.tokenizer_kwargs), **_hub_kwargs(card))
    if card.chat_template is not None:
        tokenizer.chat_template = card.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(card: ModelCard) -> PreTrainedConfig:
    """Return the `config.json` of `card` as transformers' own class, old key names and remote code mapped away."""
    source = source_of(card)
    if not card.config_mapping:
        return AutoConfig.from_pretrained(source, **_hub_kwargs(card))
    values, _ = PreTrainedConfig.get_config_dict(source, **_hub_kwargs(card))
    values.pop("auto_map", None)  # remote code, which is not run: transformers has the architecture itself
    renamed = {dict(card.config_mapping).get(key, key): value for key, value in values.items()}
    return AutoConfig.for_model(**renamed | {"model_type": card.model_type})


def source_of(card: ModelCard) -> str:
    """Return what `from_pretrained` reads: a local folder or a hub id."""
    return str(embedded_folder()) if is_embedded(card) else card.model_id


def _hub_kwargs(card: ModelCard) -> dict[str, Any]:
    return {"revision": card.revision} if card.revision else {}


def _quantization(precision: Precision, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # Sharding frameworks flatten parameters of one dtype; with the default, uint8, they refuse or fail.
            bnb_4bit_quant_storage=dtype,
        )
    return None
