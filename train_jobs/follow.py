"""Show a running job as a progress bar."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train_jobs.submit import follow


def follow_with_bar(dashboard_url: str, job_id: str, console: Console) -> None:
    """Follow the job until it ends; steps move the bar, everything else it announces is printed as a line.

    Raises:
        JobFailed: the job failed or was stopped.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting workers", total=None)

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                text = f"loss {event['losses'][0]:.4f}  {event['tokens_per_s']} tokens/s"
                progress.update(bar, completed=event["step"], total=event["num_steps"], description=text)
                # Where no bar can move (a file, CI), a line now and then shows that the work goes on.
                if not console.is_terminal and event["step"] % max(1, event["num_steps"] // 10) == 0:
                    console.print(f"step {event['step']}/{event['num_steps']}  {text}", highlight=False)
            elif "text" in event:
                progress.console.print(event["text"], highlight=False, markup=False, soft_wrap=True)

        follow(dashboard_url, job_id, on_event)
