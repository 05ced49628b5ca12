"""The servers that are compared, each started on a free port and stopped at the end."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

READY_TIMEOUT_S = 600


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def kajiya(model: str) -> Iterator[str]:
    """Run our application on a Ray of its own and yield its address."""
    import ray
    from ray import serve

    from serve_apps.app import build
    from serve_apps.args import ServeArgs

    port = free_port()
    folder = f"/tmp/kajiya-bench-{port}"  # noqa: S108 (Ray's sockets need a short path)
    # Ray lowers the priority of its workers; the peer runs at the priority of its shell.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(ServeArgs(models=[model])), name="kajiya")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def transformers_serve(model_folder: Path, *, num_cached_tokens: int, max_batch_tokens: int) -> Iterator[str]:
    """Run `transformers serve --continuous-batching` in float32 and yield its address.

    Left to itself it reserves 60% of the RAM and plans passes of 8192 tokens, which costs it most of its speed on a
    CPU. So it gets a cache of the size of ours, and the same length of a pass.
    """
    port = free_port()
    page_size = 256
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model_folder)]
    command += ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--log-level", "error", "--model-timeout", "-1"]
    command += ["--cb-block-size", str(page_size), "--cb-num-blocks", str(num_cached_tokens // page_size)]
    command += ["--cb-max-batch-tokens", str(max_batch_tokens)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, lambda: process.poll() is None)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(url: str, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and is_alive():
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not come up; run its command by hand to see why")
