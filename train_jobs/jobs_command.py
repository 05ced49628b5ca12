"""`kajiya jobs`: what was submitted to the cluster, how far it is, and how to watch or end it."""

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.local_ray import dashboard_url

if TYPE_CHECKING:  # it imports Ray
    from train_jobs.jobs import Job

app = typer.Typer(help="List the jobs of the cluster, follow one, stop one.")
out = Console()

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `kajiya jobs` lists it.")]
COLOURS = {"running": "cyan", "succeeded": "green", "failed": "red", "stopped": "yellow"}


@app.callback(invoke_without_command=True)
def jobs(context: typer.Context, as_json: Json = False) -> None:  # noqa: FBT002 (typer reads it)
    """List the jobs of the cluster, the newest first; with a word behind it, follow, stop or read one."""
    if context.invoked_subcommand is not None:
        return
    url = dashboard_url()
    from train_jobs.jobs import job_client, list_jobs

    found = list_jobs(job_client(url))
    out.print_json(data=[asdict(job) for job in found]) if as_json else out.print(_table(found))


@app.command()
def follow(job_id: Id) -> None:
    """Follow a job until it ends; Ctrl-C ends the following, not the job."""
    url = dashboard_url()
    from train_jobs.follow import follow_with_bar
    from train_jobs.jobs import find_job, job_client

    find_job(job_client(url), job_id)
    follow_with_bar(url, job_id, out)


@app.command()
def logs(job_id: Id) -> None:
    """Print what a job has said so far."""
    url = dashboard_url()
    from train_jobs.jobs import find_job, job_client, log_lines

    client = job_client(url)
    find_job(client, job_id)
    for line in log_lines(client.get_job_logs(job_id)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def stop(job_id: Id) -> None:
    """End a job, without asking; it says what it keeps."""
    url = dashboard_url()
    from train_jobs.jobs import find_job, job_client, stop_job

    client = job_client(url)
    before = find_job(client, job_id)
    if before.is_over:
        out.print(f"{job_id} is over already: {before.state}.")
        return
    with out.status(f"Stopping {job_id}"):
        after = stop_job(client, job_id)
    out.print(f"{job_id}: {after.message if after.is_over else 'does not end yet'}")


def _table(found: "list[Job]") -> Table:
    table = Table(box=None)
    table.add_column("job", no_wrap=True, overflow="fold")
    for heading in ("kind", "model", "name", "state", "step", "loss", "started"):
        table.add_column(heading)
    for job in found:
        step = "" if job.step is None else f"{job.step}/{job.num_steps}"
        loss = "" if job.loss is None else f"{job.loss:.4f}"
        started = datetime.fromisoformat(job.started_at).astimezone().strftime("%m-%d %H:%M") if job.started_at else ""
        state = Text(job.state, style=COLOURS.get(job.state, ""))
        table.add_row(Text(job.id), job.kind, Text(job.model), Text(job.name), state, step, loss, started)
    if not found:
        table.caption = "no jobs yet"
    return table
