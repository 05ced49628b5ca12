"""The deployment of one model on vLLM: Ray Serve LLM starts the engine, the surface is the transformers engine's."""

import os
import tempfile
from pathlib import Path
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from transformers import GenerationConfig
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.models.base import load_config, load_tokenizer, source_of
from cluster.plan import ServingPlan
from cluster.registry import Registry
from serve_apps.adapters import AdapterSlots
from serve_apps.leaving import end_with_engine
from serve_apps.replica_metrics import MeteredLoader
from serve_apps.runtime import Runtime, model_limits
from serve_apps.server import TransformersServer
from serve_apps.vllm_engine import LoraLoader, VllmEngine
from serve_apps.vllm_guard import end_with_this_process, remove_with_this_process


class VllmServer(TransformersServer):
    """Answers like the transformers engine, by construction: it reads requests and writes answers with the same code.

    vLLM has an OpenAI layer of its own, which ignores some fields that it cannot honour, draws other defaults, and
    words its errors differently.
    """

    async def __init__(self, llm_config: LLMConfig) -> None:  # type: ignore[misc] # Serve awaits it
        """Return once the engine is up."""
        from ray._private.worker import _global_node  # None until the process has joined its cluster

        # Below Ray's own folder, which goes with the cluster: Ray may kill this replica's watchers before they act.
        sockets = Path(tempfile.mkdtemp(prefix="vllm-", dir=_global_node.get_temp_dir_path()))
        remove_with_this_process(sockets)
        os.environ["VLLM_RPC_BASE_PATH"] = str(sockets)
        ray_server = LLMServer.sync_init(llm_config)
        await ray_server.start()
        client: AsyncLLM = ray_server.engine._engine_client
        for process in client.engine_core.resources.engine_manager.processes:
            end_with_this_process(process.pid)
        runtime = _runtime(llm_config.experimental_configs["plan"], client)
        end_with_engine(runtime.engine)
        super().__init__(llm_config, runtime)

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        """Return Serve's options, with the placement group in which vLLM's workers run."""
        options: dict[str, Any] = LLMServer.get_deployment_options(llm_config)
        return options


def _runtime(plan: ServingPlan, client: AsyncLLM) -> Runtime:
    engine = VllmEngine(client)
    loader = LoraLoader(engine, max_lora_rank=plan.max_lora_rank, target_modules=plan.card.target_modules)
    tokenizer = load_tokenizer(plan.card)
    return Runtime(
        engine=engine,
        tokenizer=tokenizer,
        adapters=AdapterSlots(
            MeteredLoader(loader=loader, model=plan.card.name), plan.card, Registry.default(), max_loras=plan.max_loras
        ),
        limits=model_limits(plan, tokenizer, _generation_config(plan)),
    )


def _generation_config(plan: ServingPlan) -> GenerationConfig:
    """Return the model's `generation_config.json` or, where it has none, what its `config.json` says."""
    card = plan.card
    try:
        return GenerationConfig.from_pretrained(
            source_of(card), **({"revision": card.revision} if card.revision else {})
        )
    except OSError:
        return GenerationConfig.from_model_config(load_config(card))
