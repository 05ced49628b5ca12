"""Models whose own weights were trained: folders under `KAJIYA_HOME`, served by their path."""

import shutil
import tempfile
from pathlib import Path

from cluster.home import make_home_folder
from cluster.manifest import Manifest
from cluster.model_card import ModelCard
from cluster.models.base import load_tokenizer

MANIFEST_FILE = "manifest.json"


def keep_model(weights: Path, card: ModelCard, manifest: Manifest) -> Path:
    """Copy the model in `weights` and the tokenizer of `card` to a new folder, numbered after the last, and return it.

    The folder holds `manifest` too. A crash leaves nothing that can be read as a model.

    Raises:
        HomeNotWritable: `KAJIYA_HOME` cannot be written.
        OSError: The disk is full.
    """
    home = make_home_folder(f"models/trained/{card.name}/{manifest.name}")
    staging = Path(tempfile.mkdtemp(dir=home, prefix="."))
    try:
        shutil.copytree(weights, staging, dirs_exist_ok=True)
        load_tokenizer(card).save_pretrained(staging)
        number = 1 + max((int(path.name[1:]) for path in home.glob("v*")), default=0)
        numbered = manifest.model_copy(update={"version": number})
        (staging / MANIFEST_FILE).write_text(numbered.model_dump_json(indent=2), encoding="utf-8")
        staging.chmod(0o755)
        return staging.rename(home / f"v{number}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
