"""Requests read each other's cache where their beginnings and adapters are the same, and nowhere else."""

import asyncio
from pathlib import Path

import pytest
from greedy import answer, assert_same, generate, limits
from peft import PeftModel
from test_engine import CONFIGS, adapter_folder, small_model
from transformers import PreTrainedModel

from serve_apps.engine import PAGE_SIZE, Engine
from serve_apps.prefixes import salted

BEGINNING = [(5 * t) % 256 + 2 for t in range(2 * PAGE_SIZE)]
NUM_TOKENS = 6


@pytest.fixture
def model() -> PreTrainedModel:
    return small_model(CONFIGS["llama"])


class CountingEngine(Engine):
    """An engine that knows how many tokens its passes read."""

    num_read = 0

    def count(self) -> None:
        processor = self._manager.batch_processor
        assert processor is not None
        prepare = processor.inputs_and_outputs.prepare_batch_tensors

        def counting(*args: object, **kwargs: int) -> None:
            self.num_read += kwargs["num_q_tokens"]
            prepare(*args, **kwargs)

        processor.inputs_and_outputs.prepare_batch_tensors = counting

    async def ask(self, prompt: list[int], *, slot: int = -1) -> tuple[list[int], int]:
        """Return the answer and how many tokens of the prompt were read for it."""
        before = self.num_read
        tokens = await answer(self, prompt, name=f"{before}", num_tokens=NUM_TOKENS, slot=slot)
        return tokens, self.num_read - before - (NUM_TOKENS - 1)


def counting_engine(model: PreTrainedModel) -> CountingEngine:
    engine = CountingEngine(model, limits())
    engine.start()
    asyncio.run(answer(engine, [7], name="first", num_tokens=1))
    engine.count()
    return engine


def test_only_what_is_new_after_a_known_beginning_is_read(model: PreTrainedModel) -> None:
    prompts = [[*BEGINNING, 9, 8], [*BEGINNING, 7], BEGINNING, [9, *BEGINNING[1:]]]
    theirs = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine = counting_engine(model)

    async def one_by_one() -> list[tuple[list[int], int]]:
        return [await engine.ask(prompt) for prompt in prompts]

    try:
        ours = asyncio.run(one_by_one())
    finally:
        engine.stop()
    # two whole blocks are known to the second; the third has to read something for its first token; the last begins
    # with another token, after which nothing is the same
    assert [num_read for _, num_read in ours] == [66, 1, 32, 64]
    for prompt, (tokens, _), expected in zip(prompts, ours, theirs, strict=True):
        assert_same(model, prompt, tokens, expected)


def test_no_adapter_reads_what_the_base_or_another_adapter_wrote(model: PreTrainedModel, tmp_path: Path) -> None:
    prompt = [*BEGINNING, 9]
    folders = [adapter_folder(small_model(CONFIGS["llama"]), tmp_path / f"{i}", r=4, seed=i) for i in range(3)]
    tuned = [PeftModel.from_pretrained(small_model(CONFIGS["llama"]), folder) for folder in folders]
    expected = [generate(base, prompt, NUM_TOKENS) for base in (small_model(CONFIGS["llama"]), *tuned)]
    engine = counting_engine(model)

    async def in_turn() -> list[tuple[list[int], int]]:
        bank = engine.attach_bank(
            num_slots=2, max_r=4, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
        )
        for slot in (0, 1):
            with engine.paused():
                bank.load_slot(slot, folders[slot])
        answered = [await engine.ask(prompt, slot=slot) for slot in (-1, 0, 1, -1, 0, 1)]
        with engine.paused():
            bank.load_slot(0, folders[2])
        return [*answered, await engine.ask(prompt, slot=0), await engine.ask(prompt, slot=0)]

    try:
        ours = asyncio.run(in_turn())
    finally:
        engine.stop()
    assert [num_read for _, num_read in ours] == [65, 65, 65, 1, 1, 1, 65, 1]
    models = [small_model(CONFIGS["llama"]), *tuned]
    for (tokens, _), index in zip(ours, (0, 1, 2, 0, 1, 2, 3, 3), strict=True):
        assert_same(models[index], prompt, tokens, expected[index])
    assert len({tuple(tokens) for tokens in expected}) == 4  # or the test would see nothing


def test_a_full_cache_forgets_the_oldest_beginnings_and_answers_everybody(model: PreTrainedModel) -> None:
    prompts = [[i + 2, *BEGINNING, 9] for i in range(12)]
    theirs = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    # 2 x 96 tokens are 6 blocks, and 2 more; each prompt takes 3, and 2 of them stay behind
    engine = Engine(model, limits(max_num_seqs=2, max_model_len=96))
    engine.start()

    async def two_at_a_time() -> list[list[int]]:
        asked = (answer(engine, prompt, name=f"{i}", num_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts))
        return await asyncio.wait_for(asyncio.gather(*asked), timeout=60)

    try:
        ours = asyncio.run(two_at_a_time())
        assert engine.occupancy().num_cached_tokens == 0
    finally:
        engine.stop()
    for prompt, tokens, expected in zip(prompts, ours, theirs, strict=True):
        assert_same(model, prompt, tokens, expected)


def test_salts_never_meet() -> None:
    # a vocabulary of 2^20 leaves 11 bits for a digit: 2049 is 1 + 1 x 2048
    assert salted([5, 6, 7, 8, 9], 2049, 2**20) == [5 + 2**20, 6 + 2**20, 7, 8, 9]
    assert salted([5, 6], 0, 2**20) == [5, 6]
    seen = {tuple(salted([a, b, 1, 1, 1], salt, 3)) for a in range(3) for b in range(3) for salt in range(50)}
    assert len(seen) == 3 * 3 * 50
    assert max(salted([151_664] * 5, 10**9, 151_665)) < 2**31
