"""Samples on disk: those of `tokenize`, one by one; tokenized once, kept while in use."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard
from train_jobs import token_block, token_cache
from train_jobs.data import read_data_file, source_sha256
from train_jobs.records import DataError, source_bytes
from train_jobs.token_block import TokenRule
from train_jobs.token_cache import prune, store_key, token_store, tokens_folder
from train_jobs.token_store import FACTS_FILE, TokenStore, lengths_of, trained_counts_of
from train_jobs.token_writer import StoreNotWritable, write_store
from train_jobs.tokenized import TokenizedData, tokenize

RULE = TokenRule(max_length=45, stop_token_ids=(), train_on="all")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def written(folder: Path, num: int, *, name: str = "chats.jsonl", bad_line: int | None = None) -> str:
    """Write `num` dialogues of different lengths, some too long."""
    lines = []
    for i in range(num):
        messages = [
            {"role": "user", "content": "q" * (i % 7 + 1)},
            {"role": "assistant", "content": "猫" * (i % 9 + 1)},
        ]
        lines.append("{}" if i + 1 == bad_line else json.dumps({"messages": messages}))
    path = folder / name
    path.write_text("\n".join(lines))
    return str(path)


def store_of(source: str, card: ModelCard, rule: TokenRule = RULE) -> TokenStore:
    return token_store(source, source_sha256(source), card, rule)


def expected(source: str) -> TokenizedData:
    return tokenize(read_data_file(source).examples, byte_tokenizer(), max_length=45)


def test_a_store_holds_what_tokenize_returns(card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_block, "BLOCK_RECORDS", 7)  # several blocks, the last one short
    source = written(tmp_path, 40)
    store, memory = store_of(source, card), expected(source)
    assert tuple(store) == tuple(memory.samples)
    assert (len(store), store[-1], store[3:9:2][1]) == (40, memory.samples[-1], memory.samples[5])
    assert lengths_of(store).tolist() == lengths_of(memory.samples).tolist()
    assert trained_counts_of(store).tolist() == trained_counts_of(memory.samples).tolist()
    assert TokenizedData(samples=store, num_cut=0).num_trained_tokens == memory.num_trained_tokens
    assert (store.facts.num_examples, store.facts.num_cut) == (40, memory.num_cut)
    assert memory.num_cut > 0
    with pytest.raises(IndexError):
        store[40]


def test_a_part_of_a_store_travels_as_its_place(card: ModelCard, tmp_path: Path) -> None:
    store = store_of(written(tmp_path, 300), card)
    part = store[10:290][1:]
    packed = pickle.dumps(part)
    assert len(packed) < 2000  # 279 numbers of 4 bytes, no tokens
    assert tuple(pickle.loads(packed)) == tuple(store)[11:290]  # noqa: S301 (our own)
    assert repr(pickle.loads(packed)) == repr(store[11:290]) != repr(store[10:289])  # noqa: S301 (our own)


def test_a_text_gives_several_samples_of_one_example(card: ModelCard, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in (100, 3)))
    store = store_of(str(path), card)
    assert store.examples.tolist() == [0, 0, 0, 1]  # 101 tokens in 45, 45 and 11, then 4


def test_a_data_set_of_the_hub_becomes_a_store_too(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(written(tmp_path, 20))
    rows = datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("org/chats", "train"): rows}[name, split])
    assert tuple(store_of("hf:org/chats", card)) == tuple(store_of(str(path), card))
    assert 1000 < source_bytes("hf:org/chats") < 10_000  # 20 dialogues of two short turns, as Arrow holds them


def test_the_same_data_is_tokenized_once_and_other_data_anew(card: ModelCard, tmp_path: Path) -> None:
    source = written(tmp_path, 5)
    first = store_of(source, card)
    (tmp_path / "b").mkdir()
    assert store_of(written(tmp_path / "b", 5, name="other.jsonl"), card).folder == first.folder
    for other in (replace(RULE, max_length=50), replace(RULE, train_on="last"), replace(RULE, stop_token_ids=(3,))):
        assert store_of(source, card, other).folder != first.folder
    assert store_of(written(tmp_path, 6), card).folder != first.folder
    template = byte_tokenizer("{{ messages[0]['content'] }}")
    keys = {store_key(source, "0", tokenizer, RULE) for tokenizer in (byte_tokenizer(), template)}
    assert len(keys) == 2


def test_a_fault_anywhere_is_named_and_leaves_nothing_behind(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_block, "BLOCK_RECORDS", 7)
    source = written(tmp_path, 40, bad_line=38)
    with pytest.raises(DataError, match=r"chats.jsonl:38: has the fields none"):
        store_of(source, card)
    assert list(tokens_folder().iterdir()) == []
    # with its marks a prompt of q letters is 19 + q tokens
    with pytest.raises(DataError, match=r"chats.jsonl:6: nothing to train on is left within max_length=25"):
        store_of(written(tmp_path, 40, bad_line=8), card, replace(RULE, max_length=25))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreNotWritable, match="KAJIYA_HOME"):
        write_store(tmp_path / "file" / "store", [], format_name="plain text")


def test_idle_stores_go_and_those_in_use_stay(card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, idle = (store_of(written(tmp_path, n), card) for n in (3, 4))
    folder = idle.folder
    for store in (used, idle):
        os.utime(store.folder / FACTS_FILE, (0, 0))
    del idle, store
    prune()
    assert (used.folder.is_dir(), folder.is_dir()) == (True, False)
    monkeypatch.setattr(token_cache, "MAX_CACHE_BYTES", 0)
    latest = store_of(written(tmp_path, 5), card)
    assert latest.folder.is_dir()
    assert len(list(latest)) == 5
