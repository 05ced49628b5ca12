"""vLLM as an engine of tokens: prompts in, tokens out, adapters by slot; texts are the server's."""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

from vllm.exceptions import VLLMError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.models.adapter_spec import AdapterSpec
from cluster.models.peft_files import AdapterFilesError, read_spec
from cluster.registry import AdapterVersion
from serve_apps.engine import EngineStopped, Progress
from serve_apps.sampling import Sampling
from serve_apps.vllm_sampling import sampling_params, token_logprobs


class VllmEngine:
    """Runs requests on a vLLM client; all methods are called from the client's event loop."""

    def __init__(self, client: AsyncLLM) -> None:
        self._client = client
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._loras: dict[int, LoRARequest] = {}
        self._lora_ids = itertools.count(1)

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        slot: int,
        on_progress: Callable[[Progress], None],
        is_streaming: bool = True,
    ) -> None:
        """Add a request; `on_progress` is called for every step or, if not streaming, once.

        Raises:
            EngineStopped: vLLM's process is gone.
        """
        self.check_health()
        params = sampling_params(
            sampling, max_tokens=max_tokens, stop_token_ids=stop_token_ids, is_streaming=is_streaming
        )
        run = self._run(request_id, prompt_ids, params, self._loras[slot] if slot >= 0 else None, on_progress)
        self._tasks[request_id] = asyncio.get_running_loop().create_task(run)
        self._tasks[request_id].add_done_callback(lambda _: self._tasks.pop(request_id, None))

    async def _run(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        lora: LoRARequest | None,
        on_progress: Callable[[Progress], None],
    ) -> None:
        try:
            prompt = {"prompt_token_ids": prompt_ids}
            async for output in self._client.generate(prompt, params, request_id, lora_request=lora):
                answer = output.outputs[0]
                logprobs = token_logprobs(answer, params.logprobs) if params.logprobs is not None else ()
                on_progress(Progress(token_ids=list(answer.token_ids), is_finished=output.finished, logprobs=logprobs))
        except VLLMError as error:
            on_progress(Progress(token_ids=[], is_finished=True, error=str(error) or type(error).__name__))

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch; its `on_progress` is not called any more."""
        if task := self._tasks.pop(request_id, None):
            task.cancel()
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def check_health(self) -> None:
        """Raise `EngineStopped` when no request can be answered any more."""
        if self._client.errored:
            raise EngineStopped("vLLM's engine process has stopped")

    def num_active_requests(self) -> int:
        """Return how many requests are in the batch or wait for it."""
        return len(self._tasks)

    async def load_lora(self, slot: int, name: str, folder: Path) -> None:
        """Replace the adapter in `slot` by the one in `folder`.

        Raises:
            AdapterFilesError: vLLM does not take it; the slot is empty then.
        """
        if self._leaving:  # a pass with one of them in it would bring its adapter back
            await asyncio.wait(self._leaving)
        if before := self._loras.pop(slot, None):
            await self._client.remove_lora(before.lora_int_id)
        number = next(self._lora_ids)
        # vLLM finds cached blocks by this name: with the number no two adapters ever share one.
        lora = LoRARequest(lora_name=f"{name}#{number}", lora_int_id=number, lora_path=str(folder))
        try:
            await self._client.add_lora(lora)
        except Exception as error:  # vLLM sends the worker's error back as a plain Exception
            self.check_health()
            await self._client.remove_lora(number)
            raise AdapterFilesError(f"vLLM refuses {folder}: {str(error).strip().splitlines()[-1]}") from error
        self._loras[slot] = lora


class LoraLoader:
    """The adapters of a vLLM engine."""

    def __init__(self, engine: VllmEngine, *, max_lora_rank: int, target_modules: tuple[str, ...]) -> None:
        self._engine = engine
        self._max_lora_rank = max_lora_rank
        self._target_modules = target_modules
        self._loop = asyncio.get_running_loop()

    def load(self, slot: int, version: AdapterVersion, folder: Path) -> None:
        """Let vLLM read the adapter; raises `AdapterFilesError`."""
        self._check(read_spec(folder), folder)
        loading = self._engine.load_lora(slot, version.served_name, folder)
        asyncio.run_coroutine_threadsafe(loading, self._loop).result()

    def _check(self, spec: AdapterSpec, folder: Path) -> None:
        if spec.r > self._max_lora_rank:
            raise AdapterFilesError(f"{folder}: r is {spec.r}; this plan holds ranks up to {self._max_lora_rank}")
        if others := [t for t in spec.target_modules if t.rpartition(".")[2] not in self._target_modules]:
            raise AdapterFilesError(
                f"{folder}: target_modules has {others[0]}; vLLM adapts {', '.join(self._target_modules)}"
            )
