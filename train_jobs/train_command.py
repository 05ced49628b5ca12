"""`kajiya train`: submit a fine-tuning run as a Ray job, and watch it as a progress bar."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from cluster.catalog import find
from cluster.local_ray import dashboard_url, is_cluster_here
from cluster.registry import check_name
from train_jobs.arguments import Request, Resume, parser, read_arguments, read_resume
from train_jobs.command_line import job_words
from train_jobs.data import check_beginning
from train_jobs.records import HUB_PREFIX
from train_jobs.run_store import find_run

USAGE = "kajiya train MODEL"
out = Console()


def train(context: typer.Context) -> None:
    """Fine-tune MODEL on the cluster and follow the job: `ray job submit -- python -m train_jobs.finetune`."""
    words = job_words(context.args)
    if not words or "--help" in words:
        parser(USAGE).print_help()
        return
    asked = read_resume(words) or read_arguments(words)
    files = [file for file in (asked.data, asked.eval_data) if file is not None]
    _check(asked, files)
    url = dashboard_url()
    from train_jobs.follow import follow_with_bar
    from train_jobs.submit import stop, submit

    job_id = submit(url, "train_jobs.finetune", words, [Path(f) for f in files if not f.startswith(HUB_PREFIX)])
    out.print(f"Job {job_id}, shown at {url}/#/jobs/{job_id}", soft_wrap=True)
    try:
        follow_with_bar(url, job_id, out)
    except KeyboardInterrupt:
        stop(url, job_id)
        out.print(f"Stopped {job_id}; nothing was registered. What it keeps, `kajiya jobs logs {job_id}` says.")
        raise


def _check(asked: Request | Resume, files: Sequence[str]) -> None:
    """Raise what can be told without the cluster."""
    if isinstance(asked, Request):
        find(asked.model)
        check_name(asked.name)
    elif is_cluster_here():
        find_run(asked.run, asked.storage)
    for file in files:
        check_beginning(file)
