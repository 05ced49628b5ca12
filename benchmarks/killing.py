"""Two nodes on this machine, a small model, and ways to end what runs on them."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.random_model import write_random_model
from train_jobs.arguments import read_arguments
from train_jobs.finetune import check
from train_jobs.job import TrainJob
from train_jobs.launch import launch
from train_jobs.loop import Outcome
from train_jobs.prepare import build_job, read_data
from train_jobs.run_store import RunStore

NUM_STEPS = 300
ZERO: dict[str, object] = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
SMALL_DISK_BYTES = 430_000
"""Room for one checkpoint and the result, not for two checkpoints."""


@dataclass(kw_only=True)
class Ground:
    """Where runs are disturbed: a head with one core, and a second node with another."""

    folder: Path
    job: TrainJob
    cluster: Cluster
    node: object = field(init=False)
    """The second node."""

    def add_node(self) -> None:
        """Start the second node."""
        self.node = self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        self.cluster.wait_for_nodes()

    def new_run(self, name: str, folder: Path | None = None) -> RunStore:
        """Return an empty run."""
        run = RunStore(root=str(folder or self.folder), run=name)
        run.write_record(b"{}")
        return run

    def train(
        self,
        run: RunStore,
        *,
        actual_workers: int = 2,
        min_workers: int | None = None,
        checkpoint_steps: int = 20,
        is_sharded: bool = False,
    ) -> Outcome:
        """Train to the end, from where `run` is."""
        job = replace(job_for(self.job, actual_workers, is_sharded=is_sharded), checkpoint_steps=checkpoint_steps)
        return launch(job, run, num_workers=actual_workers, min_workers=min_workers, use_gpu=False)

    def train_elsewhere_and_kill(
        self, run: RunStore, *, after: int, actual_workers: int = 2, is_sharded: bool = False
    ) -> None:
        """Train in a process of its own, and kill it once there is a checkpoint of step `after`."""
        told = self.folder / "told.pickle"
        told.write_bytes(pickle.dumps((self.job, run, actual_workers, is_sharded)))
        driver = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.killing", str(told)],
            env=os.environ | {"RAY_ADDRESS": self.cluster.address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: max(run.steps(), default=0) >= after)
        driver.kill()
        driver.wait()

    def once(self, run: RunStore, *, after: int, then: Callable[[], None]) -> None:
        """Do `then`, in the background, once there is a checkpoint of step `after`."""

        def act() -> None:
            wait_for(lambda: max(run.steps(), default=0) >= after)
            then()

        threading.Thread(target=act).start()

    def in_a_while(self, delay_s: float, then: Callable[[], None]) -> None:
        """Do `then`, in the background, so long after the workers have begun."""

        def act() -> None:
            wait_for(lambda: len(workers()) == 2)
            time.sleep(delay_s)
            then()

        threading.Thread(target=act).start()

    def kill_worker(self) -> None:
        """Kill one worker."""
        workers()[0].kill()

    def kill_node(self) -> None:
        """Kill the raylet of the second node."""
        self.cluster.remove_node(self.node, allow_graceful=False)

    def drain_node(self) -> None:
        """Say that the second node is about to leave."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.cluster.address]
        command += ["--node-id", self.node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]  # type: ignore[attr-defined]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", "60"]
        subprocess.run(command, check=True, capture_output=True)

    @contextmanager
    def small_disk(self) -> Iterator[Path]:
        """Yield a folder on a disk of its own, of `SMALL_DISK_BYTES`; only root can mount one."""
        folder = self.folder / "small"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)

    def check_whole(self, run: RunStore) -> None:
        """Raise unless every folder of checkpoints is a whole one, and the first one alone found room."""
        folders = [folder.name for folder in (Path(run.root) / run.run / "checkpoints").iterdir()]
        if folders != ["s00000020"] or run.steps() != [20]:
            raise AssertionError(f"a full disk left {folders}, of which {run.steps()} are read")


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """Yield the two nodes with a job for them."""
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"  # for 5: these runs are short
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False},
    )
    place = Ground(folder=folder, job=small_job(folder), cluster=cluster)
    try:
        place.add_node()
        ray.init(address=cluster.address, log_to_driver=False)
        yield place
    finally:
        ray.shutdown()
        cluster.shutdown()


def small_job(folder: Path) -> TrainJob:
    """Return a job of `NUM_STEPS` steps on a random model, for two workers."""
    model = write_random_model(folder / "model")
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(60):
            turns = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}! " * (1 + i % 7)}]
            file.write(f"{json.dumps({'messages': turns})}\n")
    words = ["--model", str(model), "--num-workers", "2", "--data", str(folder / "chats.jsonl"), "--name", "kill"]
    words += ["--max-steps", str(NUM_STEPS), "--set", "effective_batch_size=8", "--set", "micro_batch_size=4"]
    words += ["--checkpoint-steps", "20"]
    request = read_arguments([*words, "--set", "lr_scheduler_type=constant_with_warmup"])
    plan = check(request)
    return build_job(request, plan, read_data(request, plan))


def job_for(job: TrainJob, num_workers: int, *, is_sharded: bool) -> TrainJob:
    """Return `job`, which is meant for two workers, for another number of them and the same batch."""
    accumulation = 2 // num_workers
    return replace(job, gradient_accumulation_steps=accumulation, deepspeed_zero=ZERO if is_sharded else None)


def workers() -> list[psutil.Process]:
    """Return the processes of Ray Train's workers below this one."""
    return [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in _words(process)]


def _words(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def wait_for(is_so: Callable[[], bool], timeout_s: float = 180) -> None:
    """Return when `is_so` is."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not so within {timeout_s:g} s")
        time.sleep(0.02)


if __name__ == "__main__":
    job, run, num_workers, is_sharded = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 -- our own
    launch(job_for(job, num_workers, is_sharded=is_sharded), run, num_workers=num_workers, use_gpu=False)
