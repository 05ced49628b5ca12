"""The application in the test's process: real ingress, server and engine; only Serve between them is left out."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx
from fastapi import FastAPI
from greedy import limits
from ray.serve.llm import LLMConfig

from cluster.model_card import ModelCard
from cluster.models.base import load_base
from cluster.registry import Registry
from serve_apps.adapters import AdapterSlots, BankLoader
from serve_apps.embeddings import Embedder
from serve_apps.engine import Engine
from serve_apps.facts import ModelFacts
from serve_apps.http_app import serving_app
from serve_apps.ingress import Ingress
from serve_apps.requests import ModelLimits
from serve_apps.runtime import Runtime
from serve_apps.sampling import Sampling
from serve_apps.server import TransformersServer

MAX_MODEL_LEN = 256
MAX_NUM_SEQS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """What the ingress asks of a Serve handle, answered by a server in this process."""

    server: TransformersServer
    method: str = ""

    def options(self, **_: Any) -> Self:
        return self

    def __getattr__(self, name: str) -> "Handle":
        return Handle(server=self.server, method=name)

    def remote(self, *args: Any) -> "Response":
        return Response(items=getattr(self.server, self.method)(*args))


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What a call of a Serve handle returns."""

    items: AsyncIterator[Any]

    async def _fetch_future_result_async(self) -> None: ...

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.items


@dataclass(frozen=True, kw_only=True, slots=True)
class InProcess:
    """A running application."""

    app: FastAPI
    engine: Engine
    adapters: AdapterSlots

    def client(self) -> httpx.AsyncClient:
        """Return a client on the same machine, which may do everything."""
        transport = httpx.ASGITransport(self.app, client=("127.0.0.1", 4242))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120)


@contextmanager
def application(card: ModelCard, *, max_loras: int = 2) -> Iterator[InProcess]:
    """Yield the application that serves `card` with the adapters of the default registry."""
    base = load_base(card, precision="fp32")
    engine = Engine(base.model, limits(max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN))
    loader = BankLoader(engine=engine, max_loras=max_loras, max_lora_rank=8, target_modules=card.target_modules)
    runtime = Runtime(
        engine=engine,
        tokenizer=base.tokenizer,
        adapters=AdapterSlots(loader, card, Registry.default(), max_loras=max_loras),
        limits=ModelLimits(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            vocab_size=card.vocab_size,
            stop_token_ids=(),
            defaults=Sampling(temperature=0),
        ),
        embedder=Embedder(engine),
    )
    config = LLMConfig(model_loading_config={"model_id": card.name}, server_cls=TransformersServer)
    facts = {card.name: _facts(card, max_loras)}
    ingress = Ingress({card.name: Handle(server=TransformersServer(config, runtime))}, facts)
    app = serving_app(ingress, facts, None)
    engine.start()
    try:
        yield InProcess(app=app, engine=engine, adapters=runtime.adapters)
    finally:
        engine.stop()


def _facts(card: ModelCard, max_loras: int) -> ModelFacts:
    return ModelFacts(
        name=card.name,
        model_id=card.model_id,
        revision="0123abc",
        precision="fp32",
        engine="transformers",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_loras=max_loras,
        wake_timeout_s=60,
    )
