"""What Prometheus is told by a replica: how full its batch and cache are, and the coming and going of its adapters."""

import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.registry import AdapterVersion
from serve_apps.engine import Engine
from serve_apps.log import logger
from serve_apps.token_engine import AdapterLoader

SAMPLE_S = 1.0
LOAD_S = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
LABELS = ("model",)


class EngineMetrics:
    """Gauges of one transformers engine. vLLM exports its own, as `ray_vllm_…`."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._tags = {"model": model}
        self._running = Gauge("kajiya_running_requests", "Requests in the batch.", LABELS)
        self._waiting = Gauge("kajiya_waiting_requests", "Requests that wait for a place in the batch.", LABELS)
        self._used = Gauge("kajiya_kv_cache_used_tokens", "Tokens that the cache's blocks in use hold.", LABELS)
        self._total = Gauge("kajiya_kv_cache_tokens", "Tokens that all blocks of the cache hold.", LABELS)

    def sample(self) -> None:
        """Set the gauges to what is now."""
        now = self._engine.occupancy()
        self._running.set(now.num_running, self._tags)
        self._waiting.set(now.num_waiting, self._tags)
        self._used.set(now.num_cached_tokens, self._tags)
        self._total.set(now.max_cached_tokens, self._tags)

    def start(self) -> None:
        """Sample for as long as the process lives: in a thread, so that a busy event loop shows in the numbers."""
        threading.Thread(target=self._sample_forever, daemon=True, name="engine-metrics").start()

    def _sample_forever(self) -> None:
        while True:
            self.sample()
            time.sleep(SAMPLE_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteredLoader:
    """Counts and times what another loader loads. Filling a slot that was full evicts the adapter in it."""

    loader: AdapterLoader
    model: str
    _full_slots: set[int] = field(default_factory=set)

    def load(self, slot: int, version: AdapterVersion, folder: Path) -> None:
        """Let the other loader load; its errors are its own."""
        tags = {"model": self.model}
        if slot in self._full_slots:
            self._full_slots.remove(slot)
            _evictions().inc(1, tags)
        begin_s = time.monotonic()
        self.loader.load(slot, version, folder)
        seconds = time.monotonic() - begin_s
        self._full_slots.add(slot)
        _loads().inc(1, tags)
        _load_seconds().observe(seconds, tags)
        logger.info(
            "Loaded %s.", version.served_name, extra={"adapter": version.served_name, "slot": slot, "seconds": seconds}
        )


@cache
def _loads() -> Counter:
    return Counter("kajiya_adapter_loads_total", "Adapters that were put into a slot.", LABELS)


@cache
def _evictions() -> Counter:
    return Counter("kajiya_adapter_evictions_total", "Adapters that made room for another one.", LABELS)


@cache
def _load_seconds() -> Histogram:
    return Histogram("kajiya_adapter_load_seconds", "From an adapter's files to its slot.", LOAD_S, LABELS)
