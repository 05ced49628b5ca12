"""Scores of a base and an adapter on a random model: loss as PEFT, answers as `generate`, both doors alike."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fake_endpoint import served
from greedy import generate
from in_process import application
from peft import PeftModel
from registered import manifest_of, peft_folder
from test_promotion import peft_loss
from tiny_models import lively_tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from cluster.catalog import find
from cluster.model_card import ModelCard
from cluster.models.fingerprint import WrongBase
from cluster.registry import AdapterVersion, Registry
from kajiya import app
from train_jobs.endpoint_scoring import EndpointRefused, score_served
from train_jobs.records import DataError
from train_jobs.scored import Score
from train_jobs.scoring import score_here

TEXTS = ["Good morning.", "はい。", "Tea is ready at four, and cake too."]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """A base, an adapter on it, and what PEFT makes of its folder."""

    card: ModelCard
    version: AdapterVersion
    base: PreTrainedModel
    tuned: PreTrainedModel
    data: Path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    home = tmp_path_factory.mktemp("shop")
    folder = lively_tiny_folder(home / "tiny")
    card = find(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAJIYA_REGISTRY", str(home / "registry"))
        adapter = peft_folder(folder, home / "adapter", seed=1)
        version = Registry.default().add(adapter, manifest_of(card))
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(other, adapter).eval()
        yield Shop(card=card, version=version, base=base, tuned=tuned, data=write(home / "eval.jsonl", TEXTS))


def write(path: Path, answers: list[str]) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def generated(model: PreTrainedModel, tokenizer: Any, i: int) -> str:
    prompt = tokenizer(f"<|im_start|>user\n{i}?<|im_end|>\n<|im_start|>assistant\n").input_ids
    number = len(TEXTS[i].encode()) + 8
    return str(tokenizer.decode(generate(model, prompt, number), skip_special_tokens=True)).strip()


@pytest.mark.parametrize("is_tuned", [False, True])
def test_losses_and_answers_are_those_of_transformers_and_peft(shop: Shop, is_tuned: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shop.card.model_id)
    model = shop.tuned if is_tuned else shop.base
    score = score_here(shop.card, shop.version if is_tuned else None, source=shop.data, limit=None)
    assert score.loss == pytest.approx(peft_loss(model, tokenizer, TEXTS), rel=1e-5)
    assert [row.answer for row in score.answers] == [generated(model, tokenizer, i) for i in range(3)]
    assert [row.expected for row in score.answers] == TEXTS
    assert (score.exact_match, score.num_samples, score.precision) == (0.0, 3, "fp32")
    assert score.model == (shop.version.served_name if is_tuned else shop.card.name)


def test_what_the_model_says_is_right_when_it_is_expected(shop: Shop, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shop.card.model_id)
    first = generated(shop.tuned, tokenizer, 0)
    data = tmp_path / "eval.jsonl"
    messages = [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "Good morning."}]
    data.write_text(json.dumps({"messages": messages, "answer_contains": first[2:5]}) + "\n")
    assert score_here(shop.card, shop.version, source=data, limit=None).exact_match == 1.0


def test_limit_takes_the_first_and_texts_have_a_loss_only(shop: Shop, tmp_path: Path) -> None:
    assert [row.question for row in score_here(shop.card, None, source=shop.data, limit=2).answers] == ["0?", "1?"]
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "A plain text."}\n')
    score = score_here(shop.card, None, source=data, limit=None)
    assert (score.answers, score.exact_match) == ((), None)
    assert score.loss is not None


def test_an_adapter_of_another_base_is_refused(shop: Shop, tmp_path: Path) -> None:
    other = find(str(lively_tiny_folder(tmp_path / "other", head_dim=8)))
    with pytest.raises(WrongBase):
        score_here(other, shop.version, source=shop.data, limit=None)


def score_through(url: str, model: str, data: Path) -> tuple[Score, list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return score_served(client, model, source=data, limit=None, on_answer=lambda *n: seen.append(n)), seen


def test_the_endpoint_gives_the_same_answers_and_no_loss(shop: Shop, tmp_path: Path) -> None:
    here = score_here(shop.card, shop.version, source=shop.data, limit=None)
    with application(shop.card) as running, served(running.app) as url:
        there, seen = score_through(url, shop.version.served_name, shop.data)
        assert there.answers == here.answers
        assert (there.loss, seen) == (None, [(1, 3), (2, 3), (3, 3)])
        with pytest.raises(EndpointRefused, match="nobody"):
            score_through(url, f"{shop.card.name}:nobody", shop.data)
        texts = tmp_path / "texts.jsonl"
        texts.write_text('{"text": "A plain text."}\n')
        with pytest.raises(DataError, match="leave out --url"):
            score_through(url, shop.card.name, texts)
    with pytest.raises(EndpointRefused, match=r"Nothing answers at http://127\.0\.0\.1:9/v1"):
        score_through("http://127.0.0.1:9", shop.card.name, shop.data)


def test_the_command_prints_a_table_or_json(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["eval", f"{shop.card.model_id}:shop", "--data", str(shop.data)]
    printed = CliRunner().invoke(app, words).stdout
    assert "shop@1 on eval.jsonl (3 examples): loss" in printed
    assert "0 of 3 answers right" in printed
    assert all(text in printed for text in TEXTS)
    found = json.loads(CliRunner().invoke(app, [*words, "--limit", "1", "--json"]).stdout)
    assert (found["num_samples"], found["num_right"], found["exact_match"]) == (1, 0, 0.0)
