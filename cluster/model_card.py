"""What is known about one base model: the facts of its `config.json` and the counts that follow from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Architecture = str
"""A class name of transformers, such as `LlamaForCausalLM`."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "nf4", "gptq"]
"""How the weights of the linears are held in memory: what is really loaded, not what a rule asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One kind of linear layer: `out_features x in_features` weights, `count` times in the whole model."""

    name: str
    in_features: int
    out_features: int
    count: int
    has_bias: bool = False

    def num_weights(self) -> int:
        """Return in x out, summed over all layers; biases are not counted."""
        return self.in_features * self.out_features * self.count

    def num_biases(self) -> int:
        """Return the bias values over all layers."""
        return self.out_features * self.count if self.has_bias else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A base model as its `config.json` states it at `revision`. Facts only; what follows from them is a method."""

    name: str
    """The stable name in the catalog; holds no ':' (kept for adapters), '@' (versions) or '/' (hub ids)."""
    model_id: str
    """Hub id, path of a local folder, or `embedded:smollm2`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the hub's default branch."""
    aliases: tuple[str, ...] = ()
    """Further hub ids under which the same weights are published."""
    source: str
    """Where the row's numbers come from."""

    architecture: Architecture
    model_type: str
    """`model_type` as transformers registers it, after any mapping (`stablelm_epoch` is `stablelm`)."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Key/value heads per layer; fewer than `num_attention_heads` under GQA (arXiv:2305.13245)."""
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    """Whether q, k and v carry a bias (Qwen2: yes); `attention_output_bias` tells it of o."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    num_local_experts: int = 0
    """Experts per layer; 0 is a dense model."""
    num_experts_per_tok: int = 0
    config_mapping: tuple[tuple[str, str], ...] = ()
    """Keys of the published `config.json` and the names transformers knows them by (old key, new key)."""
    checkpoint_quantization: str | None = None
    """`quant_method` of a checkpoint that is published quantized ("gptq", "bitsandbytes"); None = 16 or 32 bit."""
    checkpoint_bits: int | None = None

    licence: str = "unknown"
    is_gated: bool = False
    """Whether the hub asks for an accepted licence or a form, and so for a token."""
    trust_remote_code: bool = False
    tokenizer_kwargs: tuple[tuple[str, bool], ...] = ()
    """Arguments that `AutoTokenizer.from_pretrained` needs for this model."""
    chat_template: str | None = None
    """Jinja source; None = the tokenizer brings its own."""
    stop_token_ids: tuple[int, ...] = ()

    languages: tuple[str, ...] = ()
    notes_ja: tuple[str, ...] = ()
    """The specification's own lines about this model, in its words."""
    spec_vram_gb: tuple[tuple[str, int], ...] = ()
    """The specification's memory labels, such as (("float16", 28), ("8bit", 14)). A label: the plan computes its own."""
    recommended_precision: Precision | None = None
    """The specification's quantization for this model, where it names one."""
    is_quantization_required: bool = False
    """Whether the specification writes 必須 (required) rather than 推奨 (recommended)."""
    is_cpu_offload_required: bool = False

    is_vllm_servable: bool = False
    """Whether vLLM 0.29 has this architecture (`vllm/model_executor/models/registry.py`)."""
    is_vllm_lora_servable: bool = False
    """Whether vLLM's class for it declares `SupportsLoRA`."""
    is_ollama_importable: bool = False
    """Whether `ollama create` imports its safetensors (Llama and Qwen2: yes)."""
    is_gguf_convertible: bool = False
    """Whether llama.cpp's converter knows the architecture and its tokenizer."""

    def num_parameters(self) -> int:
        """Return all parameters; tied embeddings are counted once."""
        raise NotImplementedError

    def num_linear_parameters(self) -> int:
        """Return the weights of the linears that bitsandbytes converts: all but `lm_head`, routers and 3-D experts."""
        raise NotImplementedError

    def num_active_parameters(self) -> int:
        """Return the parameters that one token passes through; fewer than all only for experts."""
        raise NotImplementedError

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The linears that can carry LoRA."""
        raise NotImplementedError

    def linears(self) -> Iterator[Linear]:
        """Yield every kind of quantizable linear with its shape."""
        raise NotImplementedError
