"""A Ray head of our own on this machine: started, found again and stopped by its process id, never by name."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from cluster.errors import UserError
from cluster.home import kajiya_home, make_home_folder

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 8.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
TOKEN_FILE = Path("~/.ray/auth_token")
"""Where Ray keeps the token of this user's clusters."""
SERVE_SETTINGS = {
    # Serve starts a dead HTTP proxy again after three checks that failed; its own 10 s keep the port shut for half a
    # minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Nothing of ours blocks a replica's event loop, so a thread for it beside Serve's only adds hand-overs: 6 of the
    # 20 ms that a first token spends outside of the engine.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # What is imported stays; looking through millions of objects for garbage again and again keeps streams waiting.
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    # The router looks at a full replica again after this long at most; with Serve's own half second, places in the
    # batch stay empty while many wait.
    "RAY_SERVE_ROUTER_RETRY_MAX_BACKOFF_S": "0.05",
}
"""What Ray Serve reads from the environment of the processes that Ray starts."""


class PortInUse(UserError, OSError):
    """A port that a server needs is taken."""


class NoCluster(UserError, RuntimeError):
    """A command needs a running cluster."""


class RayDidNotStart(UserError, RuntimeError):
    """The Ray head ended, or did not answer in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRay:
    """A Ray head that `start_ray` started."""

    pid: int
    created_s: float
    """When the process began: a later process under the same id is not ours to stop."""
    dashboard_url: str
    gcs_address: str
    temp_dir: str


def use_token() -> None:
    """Let Ray's clients in this process send the user's token, unless the user decided otherwise."""
    if TOKEN_FILE.expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_on_this_machine(url: str) -> bool:
    """Return whether `url` is that of a cluster of this machine."""
    return urlsplit(url).hostname in LOOPBACK


def is_cluster_here() -> bool:
    """Return whether commands work on this machine: another one has its own hardware, state and models."""
    url = os.environ.get("RAY_API_SERVER_ADDRESS")
    return url is None or is_on_this_machine(url)


def dashboard_url() -> str:
    """Return the dashboard of the cluster that commands work on; raises `NoCluster` where there is none."""
    use_token()
    if url := os.environ.get("RAY_API_SERVER_ADDRESS"):
        return url
    if ray := running_ray():
        return ray.dashboard_url
    raise NoCluster("No cluster is running; start one with `kajiya up`, or set RAY_API_SERVER_ADDRESS.")


def ensure_port_free(port: int, purpose: str, option: str) -> None:
    """Raise `PortInUse` if something listens on `port` of the loopback address."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise PortInUse(f"Port {port} for {purpose} is in use on this machine; choose another with {option}.")


def running_ray() -> LocalRay | None:
    """Return the head that `start_ray` started, if it still runs."""
    try:
        ray = LocalRay(**json.loads(_state_file().read_text()))
        alive = abs(psutil.Process(ray.pid).create_time() - ray.created_s) < 1
    except (FileNotFoundError, NotADirectoryError, psutil.NoSuchProcess):
        return None
    return ray if alive else None


def start_ray(*, dashboard_port: int = 8265) -> LocalRay:
    """Start a Ray head that only this machine reaches, with token authentication, and return it once it answers.

    Raises:
        PortInUse: `dashboard_port` is taken.
        RayDidNotStart: with the end of the head's log.
    """
    ensure_port_free(dashboard_port, "the Ray dashboard", "--dashboard-port")
    make_home_folder()
    if not TOKEN_FILE.expanduser().is_file():
        subprocess.run([_ray(), "get-auth-token", "--generate"], check=True, capture_output=True)
    use_token()
    temp_dir = tempfile.mkdtemp(prefix="kajiya-ray-")
    gcs_port = _free_port()
    with (Path(temp_dir) / "head.log").open("wb") as log:
        head = subprocess.Popen(
            _head_command(gcs_port, dashboard_port, temp_dir),
            # A job's `python` is then ours, also where the virtual environment is not activated.
            env=SERVE_SETTINGS
            | os.environ
            | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ray = LocalRay(
        pid=head.pid,
        created_s=psutil.Process(head.pid).create_time(),
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
        gcs_address=f"127.0.0.1:{gcs_port}",
        temp_dir=temp_dir,
    )
    staging = _state_file().with_suffix(".new")
    staging.write_text(json.dumps(asdict(ray)))
    staging.replace(_state_file())
    try:
        _wait_until_up(head, dashboard_port, Path(temp_dir) / "head.log")
    except BaseException:
        stop_ray(ray)
        raise
    return ray


def stop_ray(ray: LocalRay) -> None:
    """End the head and every process below it, and delete its temporary folder."""
    if running_ray() == ray:
        head = psutil.Process(ray.pid)
        family = [head, *head.children(recursive=True)]
        head.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    shutil.rmtree(ray.temp_dir, ignore_errors=True)
    _state_file().unlink(missing_ok=True)


def _head_command(gcs_port: int, dashboard_port: int, temp_dir: str) -> list[str]:
    options = {
        "port": gcs_port,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port,
        "ray-client-server-port": _free_port(),
        "dashboard-agent-listen-port": _free_port(),
        "temp-dir": temp_dir,
        # Serving replicas wait most of the time: a machine of few cores serves and trains at once.
        "num-cpus": 2 * (os.cpu_count() or 1) + 2,
        "object-store-memory": 512 * 2**20,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [_ray(), "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true", *flags]


def _wait_until_up(head: subprocess.Popen[bytes], dashboard_port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if head.poll() is not None:
            raise RayDidNotStart(f"Ray ended at its start: {_last_line(log)}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", dashboard_port)) == 0:
                return
        time.sleep(0.2)
    raise RayDidNotStart(f"Ray's dashboard did not answer within {START_TIMEOUT_S:.0f} s: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "its log is empty."


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _state_file() -> Path:
    return kajiya_home() / "up.json"
