import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from greedy import answer, assert_same, generate, limits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    StableLmConfig,
)

from cluster.catalog import find
from cluster.models.base import load_base
from serve_apps.engine import Engine, EngineStopped, Occupancy, Progress
from serve_apps.sampling import Sampling

NUM_TOKENS = 12
SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2, sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "stablelm": StableLmConfig(**SMALL),
    "phimoe": PhimoeConfig(**SMALL, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=258, n_positions=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
}
# Lengths from 1 to 77: one token, several blocks, and more than one pass takes.
PROMPTS = [[(7 * i + 3 * t) % 256 + 2 for t in range(1 + 4 * i)] for i in range(20)]


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start is so flat that every choice is close
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


async def answers(engine: Engine, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    asked = (answer(engine, ids, name=f"{i}", num_tokens=num_tokens) for i, ids in enumerate(PROMPTS))
    return await asyncio.gather(*asked)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(small_model(CONFIGS["llama"]), limits())
    engine.start()
    yield engine
    engine.stop()


@pytest.mark.parametrize("name", CONFIGS)
def test_twenty_requests_at_once_answer_as_generate_does(name: str) -> None:
    model = small_model(CONFIGS[name])
    theirs = [generate(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    engine = Engine(model, limits())
    engine.start()
    try:
        assert model.config._attn_implementation.startswith("kajiya") is (name != "qwen2, sliding")
        ours = asyncio.run(answers(engine))
    finally:
        engine.stop()
    for prompt, our, their in zip(PROMPTS, ours, theirs, strict=True):
        assert_same(model, prompt, our, their)


def test_the_embedded_model_in_4_bit_answers_twenty_prompts_as_generate_does(smollm2: Path) -> None:
    model = load_base(find("smollm2-135m-instruct"), precision="nf4").model
    num_tokens, prompts = 4, [prompt[:12] for prompt in PROMPTS]  # one row in 4 bit takes half a second a token
    theirs = [generate(model, prompt, num_tokens) for prompt in prompts]
    engine = Engine(model, limits())
    engine.start()

    async def ask_all() -> list[list[int]]:
        asked = (answer(engine, ids, name=f"{i}", num_tokens=num_tokens) for i, ids in enumerate(prompts))
        return await asyncio.gather(*asked)

    try:
        ours = asyncio.run(ask_all())
    finally:
        engine.stop()
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        assert_same(model, prompt, our, their)


def test_a_stop_token_ends_an_answer_and_is_its_last_token(engine: Engine) -> None:
    whole = asyncio.run(answer(engine, PROMPTS[3], name="whole", num_tokens=NUM_TOKENS))
    stop = whole[4]
    short = asyncio.run(answer(engine, PROMPTS[3], name="short", num_tokens=NUM_TOKENS, stop_token_ids=[stop]))
    assert short == whole[: whole.index(stop) + 1]


def test_a_cancelled_request_leaves_the_batch_and_its_memory(engine: Engine) -> None:
    async def scenario() -> tuple[int, int]:
        arrived: asyncio.Queue[Progress] = asyncio.Queue()
        engine.submit(
            "long", PROMPTS[5], max_tokens=200, stop_token_ids=[], sampling=Sampling(temperature=0), slot=-1,
            on_progress=arrived.put_nowait,
        )  # fmt: skip
        await arrived.get()
        before = engine.num_active_requests()
        engine.cancel("long")
        await answer(engine, PROMPTS[1], name="next", num_tokens=3)
        return before, engine.num_active_requests()

    assert asyncio.run(scenario()) == (1, 0)
    assert engine.occupancy().num_cached_tokens == 0
    assert engine._manager.output_router.result_handlers == {}


def test_more_requests_than_the_batch_holds_wait_their_turn() -> None:
    model = small_model(CONFIGS["llama"])
    theirs = [generate(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    engine = Engine(model, limits(max_num_seqs=3))
    engine.start()
    try:
        ours = asyncio.run(answers(engine))
    finally:
        engine.stop()
    for prompt, our, their in zip(PROMPTS, ours, theirs, strict=True):
        assert_same(model, prompt, our, their)


def test_occupancy_counts_the_batch_the_queue_and_the_tokens_of_blocks_in_use() -> None:
    engine = Engine(small_model(CONFIGS["llama"]), limits(max_num_seqs=1))
    engine.start()

    async def scenario() -> tuple[Occupancy, Occupancy]:
        arrived: asyncio.Queue[Progress] = asyncio.Queue()
        for name in ("first", "second"):
            engine.submit(
                name, PROMPTS[9], max_tokens=20, stop_token_ids=[], sampling=Sampling(temperature=0), slot=-1,
                on_progress=arrived.put_nowait,
            )  # fmt: skip
        await arrived.get()
        during = engine.occupancy()
        num_finished = 0
        while num_finished < 2:
            num_finished += (await arrived.get()).is_finished
        async with asyncio.timeout(30):
            while engine.num_active_requests():  # the last pass may still tidy up
                await asyncio.sleep(0.01)
        return during, engine.occupancy()

    try:
        during, after = asyncio.run(scenario())
    finally:
        engine.stop()
    # 256 tokens are 8 blocks of 32, and one more; the prompt of 37 tokens and its answer of 20 are in 2 of them
    assert during == Occupancy(num_running=1, num_waiting=1, num_cached_tokens=64, max_cached_tokens=288)
    assert after == Occupancy(num_running=0, num_waiting=0, num_cached_tokens=0, max_cached_tokens=288)


def test_a_full_house_of_longest_requests_fits_the_cache() -> None:
    engine = Engine(small_model(CONFIGS["llama"]), limits(max_num_seqs=4, max_model_len=64))
    engine.start()

    async def fill() -> list[list[int]]:
        return await asyncio.gather(*(answer(engine, PROMPTS[2], name=f"{i}", num_tokens=55) for i in range(4)))

    try:
        assert [len(tokens) for tokens in asyncio.run(fill())] == [55] * 4
    finally:
        engine.stop()


def test_a_dead_engine_says_so(engine: Engine) -> None:
    asyncio.run(answer(engine, PROMPTS[1], name="first", num_tokens=1))
    engine.check_health()
    engine._manager.adapters_of_pass = lambda: 1 / 0  # type: ignore[assignment,return-value]

    async def fail() -> str | None:
        arrived: asyncio.Queue[Progress] = asyncio.Queue()
        engine.submit(
            "x", [5], max_tokens=1, stop_token_ids=[], sampling=Sampling(), slot=-1, on_progress=arrived.put_nowait
        )
        return (await arrived.get()).error

    assert "division by zero" in (asyncio.run(fail()) or "")
    engine._manager._generation_thread.join()
    with pytest.raises(EngineStopped, match="division by zero"):
        engine.check_health()


def adapter_folder(model: PreTrainedModel, folder: Path, *, r: int, seed: int) -> Path:
    """An adapter with B that is not zero, strong enough to change answers."""
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj"] if seed % 2 else ["q_proj", "k_proj", "o_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_adapters_and_the_bare_base_in_one_batch_answer_as_peft_does(precision: str, tmp_path: Path) -> None:
    small_model(CONFIGS["llama"]).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if precision == "nf4" else None

    def load() -> PreTrainedModel:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
        ).eval()
        return loaded

    folders = [adapter_folder(load(), tmp_path / f"adapter{i}", r=2 + 2 * i, seed=i) for i in range(3)]
    slots = [(i % 4) - 1 for i in range(len(PROMPTS))]  # -1 is the base
    bases = {slot: PeftModel.from_pretrained(load(), folders[slot]) if slot >= 0 else load() for slot in range(-1, 3)}
    theirs = [generate(bases[slot], prompt, NUM_TOKENS) for slot, prompt in zip(slots, PROMPTS, strict=True)]

    engine = Engine(load(), limits())
    engine.start()

    async def mixed() -> list[list[int]]:
        bank = engine.attach_bank(
            num_slots=3, max_r=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
        )
        for slot, folder in enumerate(folders):
            with engine.paused():
                bank.load_slot(slot, folder)
        asked = zip(slots, PROMPTS, strict=True)
        return await asyncio.gather(
            *(answer(engine, ids, name=f"{i}", num_tokens=NUM_TOKENS, slot=slot) for i, (slot, ids) in enumerate(asked))
        )

    try:
        ours = asyncio.run(mixed())
    finally:
        engine.stop()
    for slot, prompt, our, their in zip(slots, PROMPTS, ours, theirs, strict=True):
        assert_same(bases[slot], prompt, our, their)
    base_answers = [generate(bases[-1], prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert sum(a != b for a, b in zip(theirs, base_answers, strict=True)) > 10  # the adapters do change answers
