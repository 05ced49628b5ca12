"""What one LoRA adapter looks like, apart from its numbers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One LoRA adapter (arXiv:2106.09685): the fields of PEFT's `LoraConfig` that Kajiya trains and serves."""

    r: int
    """Rank of the update."""
    lora_alpha: int
    """Numerator of the scaling."""
    target_modules: tuple[str, ...]
    """Names of linear layers, matched as PEFT does: the whole path, or its end after a dot."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training."""
    use_rslora: bool = False
    """Scale by the square root of the rank (arXiv:2312.03732)."""

    @property
    def scaling(self) -> float:
        """Return the factor of the update: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, module_name: str) -> bool:
        """Say whether the adapter changes the layer at `module_name`."""
        return matches(module_name, self.target_modules)


def matches(module_name: str, target_modules: tuple[str, ...]) -> bool:
    """Say whether PEFT would match the path `module_name` with one of `target_modules`."""
    return any(module_name == target or module_name.endswith(f".{target}") for target in target_modules)
