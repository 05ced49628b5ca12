"""vLLM as an engine of tokens, for tests without Ray."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from tiny_models import byte_tokenizer
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.plan import ServingPlan
from serve_apps.engine import Progress
from serve_apps.sampling import GREEDY, Sampling
from serve_apps.vllm_args import engine_kwargs
from serve_apps.vllm_engine import VllmEngine

NUM_TOKENS = 12


class Loop:
    """An event loop in a thread, and the engine that lives on it."""

    def __init__(self, plan: ServingPlan) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.client: AsyncLLM = self.run(self._start(plan))
        self.engine = VllmEngine(self.client)

    @staticmethod
    async def _start(plan: ServingPlan) -> AsyncLLM:
        kwargs = engine_kwargs(plan) | {"model": plan.card.model_id, "distributed_executor_backend": "mp"}
        kwargs["structured_outputs_config"] = StructuredOutputsConfig(**kwargs["structured_outputs_config"])
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**kwargs))

    @staticmethod
    async def _cancel_the_rest() -> None:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=120)

    def stop(self) -> None:
        self.client.shutdown()
        self.run(self._cancel_the_rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def answer(
    engine: VllmEngine,
    name: str,
    prompt: str,
    *,
    slot: int = -1,
    sampling: Sampling = GREEDY,
    num_tokens: int = NUM_TOKENS,
    stop_token_ids: tuple[int, ...] = (),
    is_streaming: bool = True,
) -> list[Progress]:
    arrived: asyncio.Queue[Progress] = asyncio.Queue()
    engine.submit(
        name,
        ids(prompt),
        max_tokens=num_tokens,
        stop_token_ids=list(stop_token_ids),
        sampling=sampling,
        slot=slot,
        on_progress=arrived.put_nowait,
        is_streaming=is_streaming,
    )
    parts = [await arrived.get()]
    while not parts[-1].is_finished:
        parts.append(await arrived.get())
    return parts


def ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text).input_ids)


def tokens(parts: list[Progress]) -> list[int]:
    assert [part.error for part in parts if part.error] == []
    return [token_id for part in parts for token_id in part.token_ids]
