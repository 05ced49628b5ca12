"""The models as the fact sheet lists them, and the sums of a plan written out a second time, without the package."""

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20

GPU_MIB = {"A10G": 23028, "L4": 23034, "A100-40G": 40960, "A100-80G": 81920, "H100": 81559}
"""memory.total of `nvidia-smi`."""


@dataclass(frozen=True)
class Facts:
    params: int
    layers: int
    h: int
    f: int
    heads: int
    kv: int
    hd: int
    vocab: int
    bf16_gb: float
    int8_gb: float
    nf4_gb: float
    kv_kib: float
    experts: int = 0
    top_k: int = 1
    is_gpt2: bool = False

    def per_layer(self) -> list[tuple[int, int]]:
        """(in, out) of the linears of one layer."""
        if self.is_gpt2:
            return [(self.h, 3 * self.h), (self.h, self.h), (self.h, self.f), (self.f, self.h)]
        q, k = self.heads * self.hd, self.kv * self.hd
        attention = [(self.h, q), (self.h, k), (self.h, k), (q, self.h)]
        return attention if self.experts else [*attention, (self.h, self.f), (self.h, self.f), (self.f, self.h)]

    def linear(self) -> int:
        return self.layers * sum(i * o for i, o in self.per_layer())

    def rows(self) -> int:
        return self.layers * sum(o for _, o in self.per_layer())

    def lora(self, r: int) -> int:
        return self.layers * sum(r * (i + o) for i, o in self.per_layer())

    def weights(self, precision: str, rest_bytes: int) -> float:
        if precision in ("fp32", "bf16", "fp16"):
            return self.params * {"fp32": 4, "bf16": 2, "fp16": 2}[precision]
        rest = (self.params - self.linear()) * rest_bytes
        if precision == "int8":
            return rest + self.linear() + 4 * self.rows()
        return rest + self.linear() * (0.5 + 1 / 64 + 4 / (64 * 256))


# L/h/f, heads/kv/hd, vocabulary and GB as published
FACTS = {
    "smollm2-135m-instruct": Facts(134515008, 30, 576, 1536, 9, 3, 64, 49152, 0.27, 0.16, 0.11, 22.5),
    "qwen2.5-14b-instruct": Facts(14770033664, 48, 5120, 13824, 40, 8, 128, 152064, 29.5, 16.3, 9.9, 192),
    "qwen2.5-32b-instruct": Facts(32763876352, 64, 5120, 27648, 40, 8, 128, 152064, 65.5, 34.3, 19.2, 256),
    "calm3-22b-chat": Facts(22542882816, 48, 6144, 16384, 48, 48, 128, 65024, 45.1, 23.3, 12.8, 1152),
    "deepseek-r1-distill-qwen-32b-japanese": Facts(
        32763876352, 64, 5120, 27648, 40, 8, 128, 152064, 65.5, 34.3, 19.2, 256
    ),
    "elyza-japanese-llama-2-7b-instruct": Facts(6738415616, 32, 4096, 11008, 32, 32, 128, 32000, 13.5, 7.0, 3.9, 512),
    "japanese-gpt2-small": Facts(110418432, 12, 768, 3072, 12, 12, 64, 32000, 0.22, 0.14, 0.09, 36, is_gpt2=True),
    "japanese-stablelm-3b-4e1t-instruct": Facts(2795443200, 32, 2560, 6912, 32, 32, 80, 50304, 5.6, 3.05, 1.8, 320),
    "llama-3.1-70b-instruct": Facts(70553706496, 80, 8192, 28672, 64, 8, 128, 128256, 141.1, 72.7, 39.5, 320),
    "phi-3.5-moe-instruct": Facts(
        41873153344, 32, 4096, 6400, 32, 8, 128, 32064, 83.7, 82.4, 81.8, 128, experts=16, top_k=2
    ),
}

# What the specification's words lead to on a GPU with bf16, and the dtype of everything unquantized
PRECISION = {
    "smollm2-135m-instruct": ("fp32", 4),  # <7B: none, float32
    "qwen2.5-14b-instruct": ("int8", 2),  # 8bit推奨
    "qwen2.5-32b-instruct": ("nf4", 2),  # 4bit必須
    "calm3-22b-chat": ("nf4", 2),  # 4bit推奨, against the size rule's 8 bit
    "deepseek-r1-distill-qwen-32b-japanese": ("int8", 2),  # 8bit推奨, against the size rule's 4 bit
    "elyza-japanese-llama-2-7b-instruct": ("int8", 2),  # 7B-20B: 8 bit (auto-gptq, loaded by bitsandbytes)
    "japanese-gpt2-small": ("fp32", 4),
    "japanese-stablelm-3b-4e1t-instruct": ("fp32", 4),
    "llama-3.1-70b-instruct": ("nf4", 2),  # 4bit必須
    "phi-3.5-moe-instruct": ("bf16", 2),  # the size rule's 4 bit would leave 98% of it in 16 bit
}
VLLM = {"qwen2.5-32b-instruct", "calm3-22b-chat", "llama-3.1-70b-instruct", "phi-3.5-moe-instruct"}
"""7B and up, and not int8."""


def serving_items(
    name: str,
    precision: str,
    value_bytes: int,
    *,
    split: int,
    streams: int,
    batch: int,
    tokens: int,
    loras: int,
    r: int,
) -> dict[str, float]:
    """Bytes of each part on one device of a replica."""
    m = FACTS[name]
    work = batch * (4 * m.h + 3 * m.f * m.top_k) * value_bytes
    if precision in ("int8", "nf4"):
        work += max(i * o for i, o in m.per_layer()) * value_bytes
    if name not in VLLM or value_bytes == 4:
        # K, V repeated for every head and V as it is, for all cached and new tokens, and a mask
        work += (tokens + batch) * ((2 * m.heads + m.kv) * m.hd + batch) * value_bytes
    return {
        "weights": m.weights(precision, value_bytes) / split,
        "KV cache": 2 * m.layers * m.kv * m.hd * tokens * value_bytes / split,
        "adapters": loras * m.lora(r) * value_bytes / split,
        "activations": work / split,
        "logits": streams * m.vocab * 4 * 2,
        "process": 768 * MIB,
    }


# A token and layer with adapters and dropout on all linears, as test_activations counts it: bytes per hidden,
# intermediate and key/value unit. Queries, attended and joined are three of a value each; keys and values two of the
# kv width; a mask of a byte for each input of an adapter.
KEPT = {
    # fp32: two norms' outputs, 8 + 12 + masks of q, k, v, o, gate, up; gate and up and the mask of down
    ("rms", 4): (26, 9, 8),
    # 16 bit: two norms' inputs in fp32 and outputs, 12 + 6 + 6; gate, silu, up, product and the mask
    ("rms", 2): (24, 9, 4),
    # two LayerNorms' inputs and outputs, 16 + 12 + 6; the MLP is that of the first row
    ("stablelm", 4): (34, 9, 8),
    # inputs of both norms and the output of one, 6 + 6 + masks of q, k, v, o, and 2 for each of two experts' results;
    # of each token twice: gate and up, silu
    ("phimoe", 2): (16 + 4, 6, 4),
    # 16 + 12 + masks of c_attn, c_proj, c_fc; five tensors of the GELU and a mask
    ("gpt2", 4): (31, 21, 8),
}


def lora_training_items(
    name: str, precision: str, value_bytes: int, *, micro: int, length: int, r: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes of each part for one worker under DDP with LoRA (dropout on) on all linears."""
    m = FACTS[name]
    kind = "gpt2" if m.is_gpt2 else "phimoe" if m.experts else "stablelm" if "stablelm" in name else "rms"
    per_h, per_f, per_kv = KEPT[kind, value_bytes]
    layer = per_h * m.h + per_f * m.f * m.top_k + per_kv * m.kv * m.hd
    # in fp32: a number per head, one per norm, LayerNorm's mean, r between A and B of each adapter
    layer += 4 * m.heads + (8 if kind == "rms" else 16) + 4 * r * len(m.per_layer())
    # a router's scores twice and masks as often, and six indices for each of two experts
    layer += 2 * (2 + 1) * m.experts + 2 * 48 if m.experts else 0
    tokens = micro * length
    kept = layer * tokens * (1 if checkpointing else m.layers)
    kept += value_bytes * m.h * tokens * m.layers if checkpointing else 0
    # the last hidden states normed, chosen, and their gradient; four fp32 tensors of the MLP's width in one backward
    kept += (3 * value_bytes * m.h + 16 * m.f * m.top_k) * tokens
    largest = max(i * o for i, o in m.per_layer()) * value_bytes if precision in ("int8", "nf4") else 0
    return {
        "weights": m.weights(precision, value_bytes),
        "adapters": 4 * m.lora(r),
        "gradients": 4 * m.lora(r),
        "optimizer": 8 * m.lora(r),
        "activations": kept,
        "logits": min(128, tokens) * m.vocab * (4 if value_bytes == 4 else 2 + 4),
        "unpacked linear": largest,
        "process": 768 * MIB,
    }
