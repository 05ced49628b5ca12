"""Which weights an adapter belongs to."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.hub import is_embedded, is_local
from cluster.model_card import ModelCard
from cluster.models.embedded import embedded_folder
from cluster.registry import AdapterVersion

SAMPLE_BYTES = 4096


class NoWeights(UserError, FileNotFoundError):
    """A model folder holds no weight file."""


class WrongBase(UserError, ValueError):
    """An adapter was trained on other weights than those it is asked to run on."""


def ensure_same_base(version: AdapterVersion, card: ModelCard) -> None:
    """Raise `WrongBase` unless `version` was trained on the weights of `card`, which are read once per process."""
    served = _fingerprint_of_process(card)
    trained_on = version.manifest.base_fingerprint
    if trained_on != served:
        raise WrongBase(
            f"{version.served_name} was trained on other weights ({trained_on}) than those served ({served}); train it "
            "again on this base."
        )


@functools.cache
def _fingerprint_of_process(card: ModelCard) -> str:
    # A process loads a base once: what its folder holds later is not what answers.
    return base_fingerprint(card)


def base_fingerprint(card: ModelCard) -> str:
    """Return a short hash that differs whenever the base's weights do, for a model whose files are on this machine.

    Every tensor's name, dtype, shape and first 4 KiB go in, so the same weights in other shards, or loaded at another
    precision, give the same fingerprint, and 140 GB take seconds. Checkpoints that are not safetensors are sampled by
    file.

    Raises:
        NoWeights: there are no weight files in the model's folder.
    """
    folder = local_folder(card)
    digest = hashlib.sha256()
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        for line in sorted(sample for shard in shards for sample in _sample_tensors(shard)):
            digest.update(line)
    else:
        files = sorted(folder.glob("*.bin"))
        if not files:
            raise NoWeights(f"{folder} holds no *.safetensors or *.bin file; the download of {card.name} is not whole.")
        for file in files:
            digest.update(_sample_file(file))
    return digest.hexdigest()[:16]


def local_folder(card: ModelCard) -> Path:
    """Return the folder that holds the files of `card`, without asking the hub."""
    if is_embedded(card):
        return embedded_folder()
    if is_local(card):
        return Path(card.model_id).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(card.model_id, revision=card.revision, local_files_only=True))


def _sample_tensors(shard: Path) -> list[bytes]:
    """Return name, dtype, shape and first bytes of each tensor, from the file's header (8 bytes length, then JSON)."""
    with shard.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        samples = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(8 + header_bytes + begin)
            facts = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
            samples.append(facts + file.read(min(end - begin, SAMPLE_BYTES)))
    return samples


def _sample_file(path: Path) -> bytes:
    """Return name, size and 64 evenly spaced blocks of a weight file."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        blocks = [path.name.encode(), str(size_bytes).encode()]
        for i in range(64):
            file.seek(i * size_bytes // 64)
            blocks.append(file.read(SAMPLE_BYTES))
    return b"".join(blocks)
