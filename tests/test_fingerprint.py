from dataclasses import replace
from pathlib import Path

import pytest
from registered import manifest_of
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.models.fingerprint import WrongBase, base_fingerprint, ensure_same_base
from cluster.registry import AdapterVersion


def test_an_adapter_of_other_weights_is_told_from_one_of_these(tmp_path: Path) -> None:
    one, other = (find(str(tiny_llama_folder(tmp_path / f"tiny-{seed}", seed=seed))) for seed in (0, 1))
    version = AdapterVersion(model=one.name, name="shop", version=3, uri="", manifest=manifest_of(one))
    ensure_same_base(version, one)
    with pytest.raises(WrongBase, match=f"shop@3 was trained on other weights .{base_fingerprint(one)}.*again"):
        ensure_same_base(version, other)


def test_the_served_weights_are_those_the_process_began_with(tmp_path: Path) -> None:
    card = find(str(tiny_llama_folder(tmp_path / "tiny")))
    version = AdapterVersion(model=card.name, name="shop", version=1, uri="", manifest=manifest_of(card))
    ensure_same_base(version, card)
    tiny_llama_folder(tmp_path / "tiny", seed=1)  # a folder that changes under a running replica
    ensure_same_base(version, card)
    with pytest.raises(WrongBase):
        ensure_same_base(replace(version, manifest=manifest_of(card)), card)
