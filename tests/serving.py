"""Applications that answer over HTTP, each on a Ray of its own, for tests."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve

from serve_apps.app import build
from serve_apps.args import ServeArgs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(args: ServeArgs, *, through_proxy: bool = False) -> Iterator[str]:
    """Yield the address of the application of `args`; nothing of it is left afterwards.

    The ingress listens by itself, as under `kajiya up`, or sits behind Serve's proxy.
    """
    port = free_port()
    # Sockets live in the folder, and their paths must be short.
    ray.init("local", num_cpus=2, include_dashboard=False, _temp_dir=f"/tmp/kj{port}", log_to_driver=False)
    try:
        if through_proxy:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        else:
            serve.start(proxy_location="Disabled")
            args = args.model_copy(update={"port": port})
        serve.run(build(args), name="kajiya")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(f"/tmp/kj{port}", ignore_errors=True)
