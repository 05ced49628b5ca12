"""What is known about one base model: the facts of its `config.json`, and the counts that follow from them."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.architectures import ARCHITECTURES, Architecture

Precision = Literal["fp32", "fp16", "bf16", "int8", "nf4", "gptq", "awq", "compressed-tensors"]
"""How the weights of the linears are held in memory: what is really loaded, not what a rule asked for."""
PREQUANTIZED: tuple[Precision, ...] = ("gptq", "awq", "compressed-tensors")
"""Precisions that only a checkpoint has; their names are its `quant_method`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One kind of linear layer, `count` times in the model: weights `[out_features, in_features]`."""

    name: str
    in_features: int
    out_features: int
    count: int

    def num_weights(self) -> int:
        """Return in x out, summed over all layers; biases are not counted."""
        return self.in_features * self.out_features * self.count


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

    architecture: str
    """Class name in transformers, a key of `ARCHITECTURES`."""
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
    """Whether q, k and v carry a bias (Qwen2: yes)."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    num_local_experts: int = 0
    """Experts per layer; 0 is a dense model."""
    num_experts_per_tok: int = 0
    config_mapping: tuple[tuple[str, str], ...] = ()
    """Keys of the published `config.json` that transformers knows by another name: (published, transformers)."""
    checkpoint_quantization: str | None = None
    """`quant_method` of a checkpoint that is published quantized ("gptq", "bitsandbytes"); None = 16 or 32 bit."""
    checkpoint_bits: int | None = None
    checkpoint_group_size: int | None = None
    """Weights that share a scale; None is one scale for each output row."""
    checkpoint_is_symmetric: bool = True
    """Whether its levels lie around zero, or each group has a zero point."""
    checkpoint_is_float: bool = False
    """Whether its levels are small floats (FP8) rather than integers."""

    licence: str = "unknown"
    is_gated: bool = False
    """Whether the hub asks for an accepted licence or a form, and so for a token."""
    trust_remote_code: bool = False
    tokenizer_kwargs: tuple[tuple[str, bool], ...] = ()
    """Arguments that `AutoTokenizer.from_pretrained` needs for this model."""
    chat_template: str | None = None
    """Jinja source; None = the tokenizer brings its own."""
    has_tokenizer_chat_template: bool = True
    """Whether the published tokenizer has a template; False with `chat_template=None` cannot chat."""
    stop_token_ids: tuple[int, ...] = ()

    languages: tuple[str, ...] = ()
    notes_ja: tuple[str, ...] = ()
    """The specification's own lines about this model, in its words."""
    spec_vram_gb: tuple[tuple[str, int], ...] = ()
    """The specification's memory labels, such as (("float16", 28), ("8bit", 14)); the plan computes its own."""
    recommended_precision: Precision | None = None
    """The specification's quantization for this model, where it names one."""
    is_quantization_required: bool = False
    """Whether the specification writes 必須 (required) rather than 推奨 (recommended)."""
    is_cpu_offload_required: bool = False
    is_gguf_convertible: bool = True
    """Whether llama.cpp's converter takes it; a tokenizer can be the obstacle as well as the architecture."""

    @property
    def layout(self) -> Architecture:
        """Return how this model's class builds its layers."""
        return ARCHITECTURES[self.architecture]

    @property
    def model_type(self) -> str:
        """Return `model_type` as transformers registers it (`stablelm_epoch` is `stablelm`)."""
        return self.layout.model_type

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Return the linears that can carry LoRA."""
        return self.layout.target_modules

    @property
    def is_vllm_servable(self) -> bool:
        """Return whether vLLM takes the published files; keys that need mapping are an architecture it has dropped."""
        return self.layout.is_vllm_servable and not self.config_mapping

    @property
    def is_vllm_lora_servable(self) -> bool:
        """Return whether vLLM serves adapters on it."""
        return self.is_vllm_servable and self.layout.is_vllm_lora_servable

    @property
    def is_ollama_importable(self) -> bool:
        """Return whether `ollama create` imports its safetensors."""
        return self.layout.is_ollama_importable

    def to_json(self) -> dict[str, Any]:
        """Return the facts and what is counted from them, as plain JSON types."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        counts = ("num_parameters", "num_linear_parameters", "num_active_parameters")
        record |= {name: getattr(self, name)() for name in counts}
        follows = ("model_type", "is_vllm_servable", "is_vllm_lora_servable", "is_ollama_importable")
        record |= {name: getattr(self, name) for name in follows}
        return {**record, "target_modules": list(self.target_modules)}

    def linears(self) -> tuple[Linear, ...]:
        """Return the kinds of linears that bitsandbytes converts: no `lm_head`, no router, no 3-D experts."""
        return (*self._attention_linears(), *self._mlp_linears())

    def _attention_linears(self) -> tuple[Linear, ...]:
        hidden, heads, layers = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_hidden_layers
        key_values = self.num_key_value_heads * self.head_dim
        shapes: tuple[tuple[str, int, int], ...]
        if self.layout.attention == "fused":
            shapes = (("attn.c_attn", hidden, heads + 2 * key_values), ("attn.c_proj", heads, hidden))
        else:
            inner = (("q_proj", heads), ("k_proj", key_values), ("v_proj", key_values))
            shapes = (*((name, hidden, out) for name, out in inner), ("o_proj", heads, hidden))
        return tuple(Linear(name=n, in_features=i, out_features=o, count=layers) for n, i, o in shapes)

    def _mlp_linears(self) -> tuple[Linear, ...]:
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = {
            "gated": (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)),
            "plain": (("mlp.c_fc", hidden, inner), ("mlp.c_proj", inner, hidden)),
            "experts": (),
        }[self.layout.mlp]
        return tuple(Linear(name=n, in_features=i, out_features=o, count=self.num_hidden_layers) for n, i, o in shapes)

    def num_linear_parameters(self) -> int:
        """Return the weights that bitsandbytes converts."""
        return sum(linear.num_weights() for linear in self.linears())

    def num_expert_parameters(self) -> int:
        """Return layers x experts x (gate, up and down of one expert); 0 for a dense model."""
        return 3 * self.hidden_size * self.intermediate_size * self.num_local_experts * self.num_hidden_layers

    def num_parameters(self) -> int:
        """Return all parameters; tied embeddings are counted once."""
        return (
            self.num_linear_parameters()
            + self.num_expert_parameters()
            + self.num_local_experts * self.hidden_size * self.num_hidden_layers  # routers
            + self._num_biases()
            + self._num_norm_parameters()
            + self._num_embedding_parameters()
        )

    def num_active_parameters(self) -> int:
        """Return the parameters that one token passes through; fewer than all only where there are experts."""
        if not self.num_local_experts:
            return self.num_parameters()
        idle = self.num_local_experts - self.num_experts_per_tok
        return self.num_parameters() - self.num_expert_parameters() * idle // self.num_local_experts

    def _num_biases(self) -> int:
        attention = self._attention_linears()
        rows = sum(x.out_features for x in attention[:-1]) if self.attention_bias else 0
        rows += attention[-1].out_features if self.attention_output_bias else 0
        rows += sum(x.out_features for x in self._mlp_linears()) if self.mlp_bias else 0
        return rows * self.num_hidden_layers + (self.vocab_size if self.lm_head_bias else 0)

    def _num_norm_parameters(self) -> int:
        per_layer = 2 * self.hidden_size * self.layout.vectors_per_norm + (2 * self.head_dim * self.layout.has_qk_norm)
        return per_layer * self.num_hidden_layers + self.hidden_size * self.layout.vectors_per_norm

    def _num_embedding_parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        positions = self.max_position_embeddings if self.layout.has_position_embeddings else 0
        return (tables * self.vocab_size + positions) * self.hidden_size
