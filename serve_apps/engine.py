"""The transformers engine: one model, one continuous batch, many requests and adapters in it."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

from cluster.models.bank import AdapterBank
from serve_apps import attention
from serve_apps.logprobs import TokenLogprobs
from serve_apps.prefixes import Prefixes
from serve_apps.priority import step_back
from serve_apps.sampling import ROUTE, BatchSampler, Route, Sampling

PAGE_SIZE = 32
"""Tokens per cache block; transformers' 256 would leave most of a short request's block empty."""


class EngineStopped(RuntimeError):
    """The generation thread is not running any more; the replica has to be replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """What one engine holds at a time."""

    max_model_len: int
    """Tokens of prompt and answer together."""
    max_num_seqs: int
    """Requests in the batch; more wait."""
    max_batch_tokens: int
    """Tokens in one forward pass; longer prompts are read in pieces."""
    kv_cache_tokens: int
    """Tokens in the cache, over all requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """New tokens of one request."""

    token_ids: list[int]
    is_finished: bool
    error: str | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    """One for each of `token_ids`, if the request asks for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """How full the engine is at the moment."""

    num_running: int
    """Requests in the batch."""
    num_waiting: int
    """Requests that wait for a place in it."""
    num_cached_tokens: int
    """Tokens that the blocks in use can hold; a request's last block is partly empty, and a shared one counts once."""
    max_cached_tokens: int


class _Manager(ContinuousBatchingManager):  # type: ignore[misc] # transformers has no types; there is no other hook
    """transformers' manager, with our attention and the adapters of each pass around its forward call."""

    adapters_of_pass: Callable[[], AbstractContextManager[None]] = nullcontext
    salt_of: Callable[[RequestState], int]
    """Tells the adapters of requests apart; 0 is the bare base."""
    prefixes: Prefixes | None = None
    """None until the generation thread has made the cache."""

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = True) -> None:  # noqa: FBT001, FBT002
        """Take the per-request attention on a CPU, and what transformers thinks best elsewhere."""
        config = model.config.get_text_config()
        is_needed = model.device.type == "cpu" or config.model_type in attention.DROPS_ARGUMENTS
        if is_needed and attention.supports(config):
            self._original_attn_impl = model.config._attn_implementation  # `stop` puts it back
            attention.PerRequestAttention(model)
        else:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        vocab_size = self.model.config.get_text_config().vocab_size
        self.prefixes = Prefixes(processor, self.salt_of, vocab_size=vocab_size)
        _sort_by_slot(processor.scheduler)
        return processor

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:  # noqa: FBT001
        assert self.prefixes is not None
        if bootstrapping and self.model.device.type == "cpu":
            step_back()
        # transformers forgets idle blocks only when nothing at all can go on. A pass takes no more than this.
        config = self.continuous_batching_config
        self.prefixes.make_room(config.max_batch_tokens // PAGE_SIZE + config.max_requests_per_batch)
        is_going_on: bool = super()._generation_loop_body(batch_processor, bootstrapping)
        return is_going_on

    def _generation_step(self) -> None:
        # Between `prepare_next_batch` and this call nothing else runs, so the sampler knows exactly this pass.
        with self.adapters_of_pass():
            super()._generation_step()


class Engine:
    """Runs requests on `model` from a thread of its own; all methods are called from one event loop."""

    def __init__(self, model: PreTrainedModel, limits: EngineLimits) -> None:
        self.model = model
        self.limits = limits
        self._bank: AdapterBank | None = None
        self._sampler = BatchSampler()
        self._pausing = threading.Lock()
        # Greedy with every stop token removed: choices are the sampler's, stop tokens each request's own.
        self._manager = _Manager(model, GenerationConfig(do_sample=False, eos_token_id=-1), _config(limits))
        self._manager.logit_processor = self._sampler
        self._manager.adapters_of_pass = self._adapters_of_pass
        self._manager.salt_of = self._salt_of

    def start(self) -> None:
        """Start the generation thread."""
        self._manager.start()

    def stop(self) -> None:
        """Stop the generation thread; requests in flight end with an error."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)

    def check_health(self) -> None:
        """Raise `EngineStopped` when no request can be answered any more."""
        status = self._manager.background_thread_status
        if not self._manager.is_running() or status.fatal_error is not None:
            raise EngineStopped(f"the generation thread has stopped: {status.fatal_error or 'no error recorded'}")

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
        """Add a request; `on_progress` is called on the running event loop, for every token or, if not streaming, once.

        Raises:
            EngineStopped: the generation thread is gone.
        """
        seen = 0
        route = Route(slot=slot, sampling=sampling, stop_token_ids=tuple(stop_token_ids))

        def forward(output: GenerationOutput) -> None:
            nonlocal seen
            before, seen = seen, len(output.generated_tokens)
            on_progress(
                Progress(
                    token_ids=output.generated_tokens[before:],
                    is_finished=output.is_finished(),
                    error=_error_of(output, route),
                    logprobs=route.logprobs[before:seen],
                )
            )

        self._manager.register_result_handler(request_id, forward)
        accepted = self._manager.add_request(
            prompt_ids,
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=is_streaming,
            eos_token_id=stop_token_ids,
            **{ROUTE: route},
        )
        if accepted is None:
            self._forget(request_id)
            self.check_health()
            raise EngineStopped("the generation thread takes no more requests")

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch before its next pass; its `on_progress` is not called any more."""
        self._forget(request_id)
        self._manager.cancel_request(request_id)

    def _forget(self, request_id: str) -> None:
        # transformers drops the handler of a finished request, not that of a cancelled one.
        with self._manager.output_router._lock:
            self._manager.output_router.result_handlers.pop(request_id, None)

    def num_active_requests(self) -> int:
        """Return how many requests are in the batch or wait for it."""
        now = self.occupancy()
        return now.num_running + now.num_waiting

    def occupancy(self) -> Occupancy:
        """Return how full the batch and the cache are; also from other threads, which may see a step half done."""
        processor = self._manager.batch_processor
        num_new = self._manager.input_queue.qsize()
        if processor is None:  # the generation thread has not come so far yet, or is gone
            return Occupancy(num_running=0, num_waiting=num_new, num_cached_tokens=0, max_cached_tokens=0)
        max_tokens = PAGE_SIZE * _num_blocks(self.limits)
        used = max_tokens * (1 - processor.cache.compute_free_capacity())
        idle = 0 if self._manager.prefixes is None else PAGE_SIZE * self._manager.prefixes.num_idle_blocks
        return Occupancy(
            num_running=len(processor.scheduler.active_requests),
            num_waiting=len(processor.scheduler.waiting_requests) + num_new,
            num_cached_tokens=round(used) - idle,
            max_cached_tokens=max_tokens,
        )

    @property
    def bank(self) -> AdapterBank | None:
        """Return the adapters of this engine; None until `attach_bank`."""
        return self._bank

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the batch between two passes, so that weights can be changed; requests in flight go on after."""
        with self._pausing, ExitStack() as stack:
            try:
                stack.enter_context(self._manager.pause())
            except RuntimeError as error:
                raise EngineStopped(str(error)) from error
            yield

    def attach_bank(self, *, num_slots: int, max_r: int, target_modules: tuple[str, ...]) -> AdapterBank:
        """Give the model slots for adapters, once; blocks until the pass that is running is over."""
        with self.paused():
            if self._bank is None:
                self._bank = AdapterBank(
                    self.model,
                    num_slots=num_slots,
                    max_r=max_r,
                    target_modules=target_modules,
                    dtype=self.model.dtype,
                )
            return self._bank

    def _adapters_of_pass(self) -> AbstractContextManager[None]:
        slots = self._sampler.slot_of_token
        if self._bank is None or not bool((slots >= 0).any()):
            return nullcontext()
        return self._bank.tokens(slots)

    def _salt_of(self, state: RequestState) -> int:
        slot = slot_of(state)
        if slot < 0 or self._bank is None:
            return 0
        return 1 + slot + self._bank.num_slots * self._bank.version(slot)


def slot_of(state: RequestState) -> int:
    """Return the slot of the request's adapter, -1 for the bare base."""
    route: Route = state.logit_processor_kwargs[ROUTE]
    return route.slot


def _sort_by_slot(scheduler: Scheduler) -> None:
    """Put the rows of one adapter side by side: a product reads and writes them in place."""
    schedule = scheduler.schedule_batch

    def schedule_batch(*budgets: int) -> tuple[list[FutureRequestState] | None, *tuple[Any, ...]]:
        requests, *sizes = schedule(*budgets)
        return requests and sorted(requests, key=lambda request: slot_of(request.state)), *sizes

    scheduler.schedule_batch = schedule_batch


def _error_of(output: GenerationOutput, route: Route) -> str | None:
    if output.error is not None:
        return output.error or "no reason given"  # the text of an exception, which may have none
    return route.error if output.is_finished() else None


def _num_blocks(limits: EngineLimits) -> int:
    return math.ceil(limits.kv_cache_tokens / PAGE_SIZE) + limits.max_num_seqs  # each ends in a partial block


def _config(limits: EngineLimits) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        # Without these two the cache takes most of the RAM there is, and a pass reserves 8192 tokens.
        num_blocks=_num_blocks(limits),
        max_batch_tokens=max(limits.max_batch_tokens, limits.max_num_seqs),
        max_requests_per_batch=limits.max_num_seqs,
        allow_block_sharing=True,  # within an adapter: see `Prefixes`
        # Both would run the sampler's Python once and replay its kernels for other requests.
        use_async_batching=False,
        use_cuda_graph=False,
        # Admission is bounded by max_num_seqs already, and a margin would keep the last requests waiting.
        safety_margin=0.0,
    )
