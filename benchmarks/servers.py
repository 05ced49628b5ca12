"""The servers that are compared, each started on a free port and stopped at the end."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.local_ray import SERVE_SETTINGS

READY_TIMEOUT_S = 600
CONTEXT = 2048
PEER_PREFIX = "/peer"
KV_CACHE_GIB = 2
"""Of vLLM: 46,000 tokens of SmolLM2 in float32; 16 streams of the longest context need 32,768."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve_instance() -> Iterator[str]:
    """Run Ray with an empty Ray Serve and yield the address of its proxy."""
    import ray
    from ray import serve

    port = free_port()
    folder = f"/tmp/kajiya-bench-{port}"  # noqa: S108 (Ray's sockets need a short path)
    # Ray lowers the priority of its workers; peers outside of it run at the priority of their shell.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for name, value in SERVE_SETTINGS.items():  # as `kajiya up` starts Ray; the peer on Ray Serve has them, too
        os.environ.setdefault(name, value)
    # Ray counts reservations, not cores: two applications may be there at once, and one of them is idle.
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def run_kajiya(model: str) -> str:
    """Run our application in the Ray Serve there is, and return its address, which is its own as under `kajiya up`."""
    from ray import serve

    from serve_apps.app import build
    from serve_apps.args import ServeArgs

    port = free_port()
    serve.run(build(ServeArgs(models=[model], port=port)), name="kajiya", route_prefix="/")
    return f"http://127.0.0.1:{port}"


def run_ray_serve_llm(model: str, folder: Path, *, prefix: str = PEER_PREFIX) -> None:
    """Run Ray Serve LLM with vLLM in the Ray Serve there is: `build_openai_app`, on a CPU, nothing else set."""
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": model, "model_source": str(folder)},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}},
        engine_kwargs={"dtype": "float32", "max_model_len": CONTEXT, "enforce_eager": True, "max_num_seqs": 32},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="peer", route_prefix=prefix)


@contextmanager
def transformers_serve(model_folder: Path, *, num_cached_tokens: int, max_batch_tokens: int) -> Iterator[str]:
    """Run `transformers serve --continuous-batching` in float32 and yield its address.

    Left to itself it reserves 60% of the RAM and plans passes of 8192 tokens, which costs it most of its speed on a
    CPU. So it gets a cache of the size of ours, and the same length of a pass.
    """
    page_size = 256
    arguments = ["serve", str(model_folder), "--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    arguments += ["--log-level", "error", "--model-timeout", "-1", "--cb-block-size", str(page_size)]
    arguments += ["--cb-num-blocks", str(num_cached_tokens // page_size)]
    arguments += ["--cb-max-batch-tokens", str(max_batch_tokens)]
    with _running("transformers", arguments, {}) as url:
        yield url


@contextmanager
def vllm_serve(model: str, model_folder: Path, adapters: Mapping[str, Path], *, max_lora_rank: int) -> Iterator[str]:
    """Run vLLM's own server with LoRA in float32, all adapters in memory at once, and yield its address.

    By its module: the `vllm` command looks for a package of that name, and the CPU build has another.
    """
    arguments = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model_folder),
        "--served-model-name",
        model,
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    arguments += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "32", "--enable-lora"]
    arguments += ["--max-loras", str(len(adapters)), "--max-lora-rank", str(max_lora_rank)]
    arguments += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    with _running("python", arguments, {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}) as url:
        yield url


@contextmanager
def _running(program: str, arguments: list[str], variables: dict[str, str]) -> Iterator[str]:
    port = free_port()
    command = [str(Path(sys.executable).with_name(program)), *arguments, "--host", "127.0.0.1", "--port", str(port)]
    process: subprocess.Popen[Any] = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | variables
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, lambda: process.poll() is None)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(url: str, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and is_alive():
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not come up; run its command by hand to see why")
