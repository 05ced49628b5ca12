"""The gate of a promotion, on a random model: losses as PEFT's, answers as `generate`'s."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import generate
from peft import PeftModel
from registered import manifest_of, peft_folder
from tiny_models import lively_tiny_folder, tiny_llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cluster.catalog import find
from cluster.model_card import ModelCard
from cluster.models.fingerprint import WrongBase
from cluster.registry import AdapterVersion, Registry
from train_jobs.promotion import Comparison, NotBetter, compare, ensure_not_worse

TEXTS = ["Good morning.", "はい。", "Tea is ready at four, and cake too."]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """Two versions of an adapter, and what PEFT makes of their folders."""

    card: ModelCard
    versions: tuple[AdapterVersion, AdapterVersion]
    models: tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("shop")
    base = lively_tiny_folder(home / "tiny")
    card = find(str(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(home / "registry"))
        folders = [peft_folder(base, home / f"{seed}", seed=seed) for seed in range(2)]
        first, second = (Registry.default().add(folder, manifest_of(card)) for folder in folders)
        models = [
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
            for folder in folders
        ]
        yield Shop(card=card, versions=(first, second), models=(models[0], models[1]))


def write(path: Path, answers: list[str], **fields: Any) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}], **fields}
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def peft_loss(model: PreTrainedModel, tokenizer: Any, answers: list[str]) -> float:
    total, count = 0.0, 0
    for i, answer in enumerate(answers):
        before = tokenizer(f"<|im_start|>user\n{i}?<|im_end|>\n<|im_start|>assistant\n").input_ids
        after = tokenizer(f"{answer}<|im_end|>").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(after), reduction="sum"))
        count += len(after)
    return total / count


def test_losses_are_those_of_peft(shop: Shop, tmp_path: Path) -> None:
    data = write(tmp_path / "eval.jsonl", TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(shop.card.model_id)
    found = compare(shop.card, *shop.versions, source=data, metric="loss")
    assert found.num_samples == 3
    for ours, model in zip((found.current, found.candidate), shop.models, strict=True):
        assert ours == pytest.approx(peft_loss(model, tokenizer, TEXTS), rel=1e-5)
    assert abs(found.current - found.candidate) > 0.002  # far more than the two may be off
    turned = compare(shop.card, *reversed(shop.versions), source=data, metric="loss")
    assert found.is_worse is not turned.is_worse
    same = compare(shop.card, shop.versions[0], shop.versions[0], source=data, metric="loss")
    assert not same.is_worse


def test_answers_are_those_of_generate(shop: Shop, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shop.card.model_id)
    prompt = tokenizer("<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n").input_ids
    texts = [tokenizer.decode(generate(model, prompt, 20), skip_special_tokens=True) for model in shop.models]
    pieces = [texts[1][i : i + 2] for i in range(16)]
    only_second = next(piece for piece in pieces if piece not in texts[0] and "\ufffd" not in piece)
    data = write(tmp_path / "eval.jsonl", ["x" * 20], answer_contains=only_second)
    found = compare(shop.card, *shop.versions, source=data, metric="exact_match")
    assert (found.current, found.candidate, found.num_samples) == (0.0, 1.0, 1)
    assert not found.is_worse


@pytest.mark.parametrize(
    ("metric", "current", "candidate", "is_worse"),
    [
        ("loss", 1.0, 1.1, True),
        ("loss", 1.0, 0.9, False),
        ("loss", 1.0, 1.000001, False),
        ("exact_match", 0.5, 0.4, True),
        ("exact_match", 0.5, 0.5, False),
        ("exact_match", 0.5, 0.6, False),
        ("loss", 1.0, float("nan"), True),
    ],
)
def test_what_is_worse(shop: Shop, metric: Any, current: float, candidate: float, *, is_worse: bool) -> None:
    found = Comparison(metric=metric, current=current, candidate=candidate, num_samples=4)
    assert found.is_worse is is_worse
    if is_worse:
        with pytest.raises(NotBetter, match=r"shop@2 is worse than version 1: .* nothing was promoted"):
            ensure_not_worse(found, *shop.versions)
    else:
        ensure_not_worse(found, *shop.versions)


def test_texts_without_answers_have_a_loss_only(shop: Shop, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "A plain text."}\n')
    assert compare(shop.card, *shop.versions, source=data, metric="loss").num_samples == 1
    with pytest.raises(NotBetter, match="use --metric loss"):
        compare(shop.card, *shop.versions, source=data, metric="exact_match")


def test_an_adapter_of_another_base_is_refused(shop: Shop, tmp_path: Path) -> None:
    other = find(str(tiny_llama_folder(tmp_path / "other", seed=1)))
    with pytest.raises(WrongBase):
        compare(other, *shop.versions, source=write(tmp_path / "eval.jsonl", TEXTS), metric="loss")
