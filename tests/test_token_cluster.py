"""A large data set is tokenized on the cluster, to the same store, and brought to machines that do not see it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from test_pack import adapter, job_of
from tiny_models import tiny_llama_folder

from cluster.catalog import find
from cluster.model_card import ModelCard
from train_jobs import token_cache, token_carrier
from train_jobs.data import source_sha256
from train_jobs.job import TrainJob
from train_jobs.records import DataError
from train_jobs.token_block import BLOCK_RECORDS, TokenRule
from train_jobs.token_cache import token_store
from train_jobs.token_carrier import carried
from train_jobs.token_store import FILES, TokenStore
from train_jobs.tokens import Sample

pytestmark = pytest.mark.cluster
RULE = TokenRule(max_length=60, stop_token_ids=(), train_on="all")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return find(str(tiny_llama_folder(tmp_path_factory.mktemp("models") / "tiny")))


def written(folder: Path, *, bad_line: int | None = None) -> str:
    turns = [[("user", "q" * (i % 7 + 1)), ("assistant", "a" * (i % 9 + 1))] for i in range(3 * BLOCK_RECORDS + 5)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in pair]}) for pair in turns]
    if bad_line is not None:
        lines[bad_line - 1] = "{"
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return str(folder / "chats.jsonl")


def test_the_cluster_makes_the_same_store_and_names_the_same_fault(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path)
    contents = []
    for name, large in (("here", 2**30), ("there", 0)):
        monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / name))
        monkeypatch.setattr(token_cache, "LARGE_BYTES", large)
        store = token_store(source, source_sha256(source), card, RULE)
        contents.append([(store.folder / file).read_bytes() for file in FILES])
    assert contents[0] == contents[1]
    assert len(store) == 3 * BLOCK_RECORDS + 5
    number = 2 * BLOCK_RECORDS + 3
    bad = written(tmp_path, bad_line=number)
    with pytest.raises(DataError, match=rf"chats.jsonl:{number}: not JSON"):
        token_store(bad, source_sha256(bad), card, RULE)


def test_a_machine_that_does_not_see_the_store_gets_a_copy_once(
    card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "driver"))
    monkeypatch.setattr(token_carrier, "CHUNK_BYTES", 1000)
    source = written(tmp_path)
    store = token_store(source, source_sha256(source), card, RULE)
    job = carried(replace(job_of(card, adapter(1)), samples=store[5:], held_out=store[:5]))

    def read(job: TrainJob) -> list[Sample]:
        assert isinstance(job.samples, TokenStore)
        _, (folder, indices, fetch) = job.samples.__reduce__()
        return [job.samples[0], TokenStore(tmp_path / "not here" / folder.name, indices, fetch)[0]]

    home = {"KAJIYA_HOME": str(tmp_path / "worker")}
    elsewhere = ray.remote(read).options(runtime_env={"env_vars": home})
    assert ray.get([elsewhere.remote(job) for _ in range(2)]) == [[store[5]] * 2] * 2
    copy = tmp_path / "worker" / "tokens" / store.folder.name
    assert all((copy / file).read_bytes() == (store.folder / file).read_bytes() for file in FILES)
