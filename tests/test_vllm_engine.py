"""vLLM as an engine of tokens, on a tiny model without Ray: adapters in one batch, the prefix cache, sampling."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import assert_same, generate
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import IM_END, byte_tokenizer, lively_tiny_folder, tiny_base
from transformers import PreTrainedModel
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_loop import NUM_TOKENS, Loop, answer, ids, tokens

from cluster.catalog import find
from cluster.hardware import detect
from cluster.models.peft_files import AdapterFilesError
from cluster.plan import ServingPlan, plan_serving
from serve_apps.engine import EngineStopped, Progress
from serve_apps.grammar import Grammar, compile_grammar
from serve_apps.sampling import GREEDY, Sampling

pytestmark = pytest.mark.cluster

TARGETS = (("q_proj", "v_proj"), ("q_proj", "k_proj", "up_proj"), ("down_proj", "o_proj"), ("gate_proj",))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention for CPUs has no narrower heads.
    return lively_tiny_folder(tmp_path_factory.mktemp("models") / "tiny-vllm", head_dim=32)


@pytest.fixture(scope="module")
def base(tiny: Path) -> PreTrainedModel:
    return tiny_base(tiny)


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of different rank and different linears."""
    home = tmp_path_factory.mktemp("adapters")
    for i, targets in enumerate(TARGETS):
        torch.manual_seed(i)
        peft = get_peft_model(tiny_base(tiny), LoraConfig(r=2 + 2 * i, lora_alpha=8, target_modules=list(targets)))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        peft.save_pretrained(home / str(i))
    return [home / str(i) for i in range(len(TARGETS))]


@pytest.fixture(scope="module")
def plan(tiny: Path) -> ServingPlan:
    wishes: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 16, "num_adapters": 3, "max_lora_rank": 8}
    return plan_serving(find(str(tiny)), detect(), engine="vllm", **wishes)


@pytest.fixture(scope="module")
def loop(plan: ServingPlan, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path_factory.mktemp("sockets")))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        running = Loop(plan)
        try:
            for slot in range(3):
                running.run(running.engine.load_lora(slot, f"tiny:a{slot}@1", adapters[slot]))
            yield running
        finally:
            running.stop()


def test_adapters_of_any_rank_and_the_base_in_one_batch_answer_as_peft_does(
    loop: Loop, tiny: Path, base: PreTrainedModel, adapters: list[Path]
) -> None:
    peers = {slot: PeftModel.from_pretrained(tiny_base(tiny), adapters[slot]).eval() for slot in range(3)} | {-1: base}
    prompts = [f"{chr(97 + i)} question" for i in range(16)]

    async def ask_all() -> list[list[Progress]]:
        return await asyncio.gather(
            *(answer(loop.engine, f"mixed-{i}", prompt, slot=i % 4 - 1) for i, prompt in enumerate(prompts))
        )

    answers = [tokens(parts) for parts in loop.run(ask_all())]
    for i, (prompt, ours) in enumerate(zip(prompts, answers, strict=True)):
        peer = peers[i % 4 - 1]
        assert_same(peer, ids(prompt), ours, generate(peer, ids(prompt), NUM_TOKENS))
    assert len({tuple(ours) for ours in answers}) > 8  # prompts and adapters do make a difference


def test_the_prefix_cache_never_crosses_adapters(
    loop: Loop, tiny: Path, base: PreTrainedModel, adapters: list[Path]
) -> None:
    prompt = "the same long prompt for everybody, " * 5  # 180 tokens: five whole blocks of 32
    peers = [(-1, base)] + [(i, PeftModel.from_pretrained(tiny_base(tiny), adapters[i]).eval()) for i in range(2)]
    expected = {slot: generate(peer, ids(prompt), NUM_TOKENS) for slot, peer in peers}
    assert len({tuple(answer) for answer in expected.values()}) == 3
    for turn in range(2):
        for slot, peer in peers:
            ours = tokens(loop.run(answer(loop.engine, f"prefix-{turn}-{slot}", prompt, slot=slot)))
            assert_same(peer, ids(prompt), ours, expected[slot])
    # Without a cache this would prove nothing: the second turn found the blocks of the first.
    assert loop.run(num_cached(loop.client, prompt)) >= 160


async def num_cached(client: AsyncLLM, prompt: str) -> int:
    params = SamplingParams(max_tokens=1)
    outputs = [o async for o in client.generate({"prompt_token_ids": ids(prompt)}, params, "cached")]
    return int(outputs[-1].num_cached_tokens or 0)


def test_an_adapter_given_a_taken_slot_answers_for_itself(loop: Loop, tiny: Path, adapters: list[Path]) -> None:
    prompt = "which adapter is this? " * 4
    peer = PeftModel.from_pretrained(tiny_base(tiny), adapters[3]).eval()
    before = tokens(loop.run(answer(loop.engine, "before", prompt, slot=2)))
    loop.run(loop.engine.load_lora(2, "tiny:a2@1", adapters[3]))  # the same name, as after a removal
    after = tokens(loop.run(answer(loop.engine, "after", prompt, slot=2)))
    assert_same(peer, ids(prompt), after, generate(peer, ids(prompt), NUM_TOKENS))
    assert before != after
    loop.run(loop.engine.load_lora(2, "tiny:a2@1", adapters[2]))
    assert tokens(loop.run(answer(loop.engine, "again", prompt, slot=2))) == before
    assert len(loop.run(loop.client.list_loras())) == 3  # the others made room


def test_an_adapter_that_vllm_refuses_leaves_the_engine_running(
    loop: Loop, adapters: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text((adapters[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    held = loop.run(loop.client.list_loras())
    with pytest.raises(AdapterFilesError, match="vLLM refuses"):
        loop.run(loop.engine.load_lora(7, "tiny:broken@1", tmp_path))
    assert loop.run(loop.client.list_loras()) == held
    assert len(tokens(loop.run(answer(loop.engine, "goes-on", "a", slot=0)))) == NUM_TOKENS


def test_stop_tokens_end_an_answer_and_are_part_of_it(loop: Loop, base: PreTrainedModel) -> None:
    prompt = "tell me"
    whole = generate(base, ids(prompt), NUM_TOKENS)
    stop = whole[5]
    for is_streaming in (True, False):
        parts = loop.run(
            answer(loop.engine, f"stop-{is_streaming}", prompt, stop_token_ids=(stop,), is_streaming=is_streaming)
        )
        assert tokens(parts) == whole[: whole.index(stop) + 1]
        assert (len(parts) == 1) == (not is_streaming)
    held = Sampling(temperature=0, min_tokens=NUM_TOKENS)
    parts = loop.run(answer(loop.engine, "min", prompt, sampling=held, stop_token_ids=(stop,)))
    assert len(tokens(parts)) == NUM_TOKENS
    assert stop not in tokens(parts)[:-1]


@torch.no_grad()
def test_logprobs_are_the_models_own_whatever_the_sampling(loop: Loop, base: PreTrainedModel) -> None:
    prompt = "tell me"
    sampling = Sampling(temperature=1.7, seed=5, num_logprobs=3, repetition_penalty=1.3)
    parts = loop.run(answer(loop.engine, "logprobs", prompt, sampling=sampling))
    told = [logprobs for part in parts for logprobs in part.logprobs]
    chosen = tokens(parts)
    assert [logprobs.token_id for logprobs in told] == chosen
    scores = base(torch.tensor([[*ids(prompt), *chosen]])).logits[0].float().log_softmax(-1)
    for i, logprobs in enumerate(told):
        row = scores[len(ids(prompt)) - 1 + i]
        assert logprobs.logprob == pytest.approx(float(row[logprobs.token_id]), abs=1e-3)
        assert [value for _, value in logprobs.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_a_bias_a_seed_and_a_schema_are_kept(loop: Loop) -> None:
    letter = ids("z")[0]
    biased = Sampling(temperature=0, logit_bias=((letter, 100.0),))
    assert tokens(loop.run(answer(loop.engine, "bias", "a", sampling=biased))) == [letter] * NUM_TOKENS
    drawn = [
        tokens(loop.run(answer(loop.engine, f"seed-{i}", "a", sampling=Sampling(temperature=1.5, seed=s))))
        for i, s in enumerate((1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    schema: dict[str, Any] = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    grammar = compile_grammar(Grammar.from_json_schema(schema), byte_tokenizer(), (IM_END,))
    sampling = Sampling(temperature=1.0, seed=0, grammar=grammar)
    parts = loop.run(answer(loop.engine, "json", "a", sampling=sampling, num_tokens=200, stop_token_ids=(IM_END,)))
    assert json.loads(byte_tokenizer().decode(tokens(parts)[:-1]))["ok"] in (True, False)


def test_a_cancelled_request_leaves_the_batch_without_a_word(loop: Loop) -> None:
    heard: list[Progress] = []

    async def leave() -> int:
        engine = loop.engine
        options: dict[str, Any] = {"stop_token_ids": [], "sampling": GREEDY, "slot": 0}
        engine.submit("leaving", ids("long"), max_tokens=240, on_progress=heard.append, **options)
        while not heard:
            await asyncio.sleep(0.005)
        engine.cancel("leaving")
        seen = len(heard)
        await asyncio.sleep(0.3)
        assert len(heard) == seen
        return engine.num_active_requests()

    assert loop.run(leave()) == 0
    assert not loop.client.output_processor.has_unfinished_requests()


def test_a_dead_engine_ends_its_requests_and_takes_no_more(loop: Loop) -> None:  # the last: nothing runs after it
    async def outlive() -> Progress:
        task = asyncio.create_task(answer(loop.engine, "doomed", "long", slot=0, num_tokens=240))
        await asyncio.sleep(0.1)
        for process in loop.client.engine_core.resources.engine_manager.processes:
            process.kill()
        async with asyncio.timeout(30):
            return (await task)[-1]

    end = loop.run(outlive())
    assert end.is_finished
    assert end.error
    with pytest.raises(EngineStopped):
        loop.run(answer(loop.engine, "late", "a"))
    with pytest.raises(EngineStopped):
        loop.engine.check_health()
