import asyncio
import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import answer, generate, limits
from peft import PeftModel
from ray.llm._internal.serve.core.configs.openai_api_models import EmbeddingCompletionRequest
from test_engine import CONFIGS, adapter_folder, small_model
from tiny_models import byte_tokenizer
from transformers import PreTrainedModel

from serve_apps import embeddings
from serve_apps.embeddings import Embedder, EmbeddingJob, read_embeddings
from serve_apps.engine import Engine
from serve_apps.refusals import Refusal
from serve_apps.requests import ModelLimits
from serve_apps.sampling import Sampling

INPUTS = ([5, 6, 7], [9], list(range(10, 50)), [5, 6, 8, 40, 41])
LIMITS = ModelLimits(
    max_model_len=20, max_num_seqs=4, vocab_size=258, stop_token_ids=(1,), defaults=Sampling(temperature=0.7)
)


@torch.no_grad()
def mean_of_last_hidden_states(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Alone, by transformers' own account of hidden states."""
    mean: torch.Tensor = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
    return mean


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return small_model(CONFIGS[request.param])


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    engine = Engine(model, limits())
    engine.start()
    yield engine
    engine.stop()


def embed(engine: Engine, inputs: tuple[list[int], ...], slot: int = -1) -> torch.Tensor:
    embedder = Embedder(engine)
    return torch.cat([embedder.embed(group, slot) for group in embedder.passes(inputs)])


def test_an_embedding_is_the_mean_of_the_last_hidden_states_whatever_is_in_the_pass(
    model: PreTrainedModel, request: pytest.FixtureRequest
) -> None:
    expected = torch.stack([mean_of_last_hidden_states(model, ids) for ids in INPUTS])
    engine = request.getfixturevalue("engine")  # it changes the model's attention
    torch.testing.assert_close(embed(engine, INPUTS), expected, atol=1e-5, rtol=1e-5)


def test_the_batch_goes_on_around_embeddings() -> None:
    model = small_model(CONFIGS["llama"])
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    theirs = [generate(model, prompt, 60) for prompt in prompts]
    expected = mean_of_last_hidden_states(model, INPUTS[0])
    engine = Engine(model, limits())
    engine.start()

    async def both() -> tuple[list[list[int]], list[torch.Tensor]]:
        answers = asyncio.gather(*(answer(engine, ids, name=f"{i}", num_tokens=60) for i, ids in enumerate(prompts)))
        rows = [await asyncio.to_thread(embed, engine, INPUTS[:1]) for _ in range(5)]
        return list(await answers), rows

    try:
        ours, rows = asyncio.run(both())
    finally:
        engine.stop()
    assert ours == theirs
    for row in rows:
        torch.testing.assert_close(row[0], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_embeds_as_peft_does(tmp_path: Path) -> None:
    folder = adapter_folder(small_model(CONFIGS["llama"]), tmp_path, r=4, seed=1)
    peft = PeftModel.from_pretrained(small_model(CONFIGS["llama"]), folder).eval()
    expected = torch.stack([mean_of_last_hidden_states(peft, ids) for ids in INPUTS])
    base = torch.stack([mean_of_last_hidden_states(small_model(CONFIGS["llama"]), ids) for ids in INPUTS])
    engine = Engine(small_model(CONFIGS["llama"]), limits())
    engine.start()
    try:
        bank = engine.attach_bank(num_slots=1, max_r=4, target_modules=("q_proj", "v_proj"))
        with engine.paused():
            bank.load_slot(0, folder)
        torch.testing.assert_close(embed(engine, INPUTS, slot=0), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embed(engine, INPUTS), base, atol=1e-5, rtol=1e-5)
    finally:
        engine.stop()
    assert not torch.allclose(expected, base, atol=1e-2)


def test_a_pass_holds_as_many_texts_as_fit_and_cuts_none() -> None:
    engine = Engine(small_model(CONFIGS["llama"]), limits(max_batch_tokens=64))
    lengths = [30, 30, 5, 100, 64, 1]
    groups = Embedder(engine).passes(tuple([7] * n for n in lengths))
    assert [[len(ids) for ids in group] for group in groups] == [[30, 30], [5], [100], [64], [1]]


def read(**fields: Any) -> EmbeddingJob:
    return read_embeddings(EmbeddingCompletionRequest(**fields), byte_tokenizer(), LIMITS)


@pytest.mark.parametrize(
    ("value", "inputs"),
    [("Hi", ["Hi"]), (["Hi", "you"], ["Hi", "you"]), ([42, 43], [[42, 43]]), ([[42], [43]], [[42], [43]])],
)
def test_an_input_is_text_or_tokens_one_or_many(value: Any, inputs: list[Any]) -> None:
    expected = [one if isinstance(one, list) else byte_tokenizer()(one).input_ids for one in inputs]
    assert list(read(input=value).inputs) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": "x" * 21}, "input"),
        ({"input": [258]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "use_activation": True}, "use_activation"),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "a", "colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        read(**fields)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_base64_is_little_endian_float32_as_openais_client_reads_it() -> None:
    rows = torch.tensor([[1.0, -2.5], [0.1, 3.0]])
    plain = embeddings.body(read(input=["a", "bc"]), rows, "m")
    packed = embeddings.body(read(input=["a", "bc"], encoding_format="base64"), rows, "m")
    for one, other, row in zip(plain["data"], packed["data"], rows.tolist(), strict=True):
        assert one["embedding"] == row
        assert list(struct.unpack("<2f", base64.b64decode(other["embedding"]))) == row
    assert plain["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
