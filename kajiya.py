"""The `kajiya` command: one function per verb, each a few calls into the packages."""

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated, Any, Literal, NoReturn, get_args

import typer
from rich.console import Console
from rich.markup import escape

from cluster import local_ray
from cluster.catalog import all_models, find
from cluster.errors import UserError
from cluster.hardware import Hardware, declared, detect
from cluster.home import KEY_VARIABLE
from cluster.model_card import Precision
from serve_apps.adapters_command import adapters, exact_version
from serve_apps.keys_command import check_host, has_keys, keys
from train_jobs import data_command, eval_command, jobs_command, train_command
from train_jobs.command_line import PASS_ON
from tune_spaces import tune_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(adapters, name="adapters")
app.add_typer(data_command.app, name="data")
app.command("eval")(eval_command.evaluate)
app.add_typer(jobs_command.app, name="jobs")
app.add_typer(keys, name="keys")
out = Console()

Model = Annotated[str, typer.Argument(help="Name in the catalog, hub id, or folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Gpu = Annotated[str | None, typer.Option(help="Plan for this GPU, as Ray names it (A10G, A100-80G, H100).")]
NumGpus = Annotated[int, typer.Option(help="GPUs per node, with --gpu.", min=1)]
Engine = Annotated[
    Literal["transformers", "vllm"] | None, typer.Option(help="Engine that serves; by default the plan's choice.")
]
Context = Annotated[int | None, typer.Option(help="Tokens per request, or per sample of training.", min=1)]
Streams = Annotated[int | None, typer.Option(help="Requests in one batch of a replica.", min=1)]
Host = Annotated[str, typer.Option(help="Address to listen on; other machines need a key (kajiya keys create).")]
Port = Annotated[int, typer.Option(help="Port of the HTTP endpoint.", min=1, max=65535)]
DashboardPort = Annotated[int, typer.Option(help="Port of the Ray dashboard.", min=1, max=65535)]


@app.command()
def models(gpu: Gpu = None, num_gpus: NumGpus = 1, as_json: Json = False) -> None:
    """Show the catalog: size, licence, engine, precision, memory, and what fits here."""
    from cluster.tables import models_table

    cards = all_models()
    if as_json:
        out.print_json(data=[asdict(card) | {"num_parameters": card.num_parameters()} for card in cards])
    else:
        out.print(models_table(cards, _hardware(gpu, num_gpus)))


@app.command()
def plan(
    model: Model,
    purpose: Annotated[Literal["serve", "train"], typer.Option("--for", help="What the plan is for.")] = "serve",
    gpu: Gpu = None,
    num_gpus: NumGpus = 1,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8 or nf4.")] = None,
    context: Context = None,
    streams: Streams = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """Show precision, memory, batch, offload and parallelism for MODEL, each with its reason."""
    from cluster.plan import ServingPlan, TrainingPlan, plan_serving, plan_training
    from cluster.tables import plan_table

    card, hardware = find(model), _hardware(gpu, num_gpus)
    chosen = check_precision(precision)
    made: ServingPlan | TrainingPlan
    if purpose == "serve":
        made = plan_serving(
            card, hardware, precision=chosen, engine=engine, max_model_len=context, max_num_seqs=streams
        )
    else:
        made = plan_training(card, hardware, precision=chosen, max_length=context)
    out.print_json(data=made.to_json()) if as_json else out.print(plan_table(made))


@app.command()
def up(
    names: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models to serve.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dashboard_port: DashboardPort = 8265,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8 or nf4, for all models.")] = None,
    engine: Engine = None,
    context: Context = None,
    streams: Streams = None,
    gpu: Gpu = None,
    num_gpus: NumGpus = 1,
    min_replicas: Annotated[int | None, typer.Option(help="Replicas without load; 0 frees the GPU.", min=0)] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Replicas at full load.", min=1)] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the models.", min=1)] = 1800,
) -> None:
    """Start Ray here (or join the cluster at RAY_API_SERVER_ADDRESS), serve the models, print the URLs."""
    from cluster.hub import ensure_available
    from cluster.plan import plan_serving
    from serve_apps.args import ModelArgs, ServeArgs, check_replicas

    wanted = names or ["smollm2-135m-instruct"]
    chosen = check_precision(precision)
    check_replicas("up", min_replicas, max_replicas)
    check_host(host)
    joined = os.environ.get("RAY_API_SERVER_ADDRESS")
    ray = local_ray.running_ray()
    planned: dict[str, Any] = {"precision": chosen, "engine": engine, "max_model_len": context, "max_num_seqs": streams}
    for name in wanted:
        card = find(name)
        if gpu or not joined:
            plan_serving(card, _hardware(gpu, num_gpus), **planned)
        ensure_available(card)
    url = joined or (ray.dashboard_url if ray else "")
    served = _served(url) if url else {}
    if not joined and served.get("port") != port:
        local_ray.ensure_port_free(port, "the HTTP endpoint", "--port")
    if not url:
        with out.status("Starting Ray"):
            url = local_ray.start_ray(dashboard_port=dashboard_port).dashboard_url
    from serve_apps.deploy import deploy

    running = [m if isinstance(m, dict) else {"model": m} for m in served.get("models", [])]
    kept = [ModelArgs.model_validate(m) for m in running if m["model"] not in wanted]
    wishes = planned | {"gpu": gpu, "num_gpus": num_gpus if gpu else None}
    wishes |= {"min_replicas": min_replicas, "max_replicas": max_replicas}
    # On a cluster of others, applications share Serve's proxy; on ours, the ingress is the only door.
    door = {} if joined else {"host": host, "port": port}
    models = [*kept, *(ModelArgs.model_validate({"model": name, **wishes}) for name in wanted)]
    args = ServeArgs.model_validate({"models": models, **door})
    with out.status("Loading models") as status:
        on_status = lambda s: status.update(f"Models: {s}")  # noqa: E731
        deploy(url, args, host=host, port=port, timeout_s=timeout_s, on_status=on_status)
    print_doors(port, url, wanted[0])


@app.command()
def down() -> None:
    """Stop what `kajiya up` started; on a cluster that was joined, remove only our application."""
    if ray := local_ray.running_ray():
        with out.status("Stopping Ray"):
            local_ray.stop_ray(ray)
        out.print("Stopped Ray and all that ran on it.")
    elif os.environ.get("RAY_API_SERVER_ADDRESS"):
        from serve_apps.deploy import undeploy

        undeploy(local_ray.dashboard_url())
        out.print("Removed the application; the cluster runs on.")
    else:
        out.print("Nothing to stop.")


app.command(context_settings=PASS_ON, add_help_option=False)(train_command.train)
app.command(context_settings=PASS_ON, add_help_option=False)(tune_command.tune)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="MODEL, MODEL:ADAPTER or MODEL:ADAPTER@VERSION.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask once and end.")] = None,
    base_url: Annotated[str, typer.Option(help="The endpoint.")] = "http://127.0.0.1:8000/v1",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
) -> None:
    """Talk to a served model; the answer streams."""
    from serve_apps.chat import Conversation

    conversation = Conversation(base_url, model, max_tokens=max_tokens, temperature=temperature)
    questions = [message] if message else iter(lambda: out.input("[bold]› [/]"), "")
    for question in questions:
        for piece in conversation.ask(question):
            out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        out.print()


@adapters.command("promote")
def adapters_promote(
    adapter: Annotated[str, typer.Argument(help="MODEL:ADAPTER@VERSION")],
    require_eval: Annotated[
        str | None, typer.Option(help="Only if it is not worse on this data than the current version.")
    ] = None,
    metric: Annotated[Literal["loss", "exact_match"], typer.Option(help="With --require-eval.")] = "loss",
) -> None:
    """Let MODEL:ADAPTER mean this version for everybody, from the next request on."""
    from cluster.registry import Registry

    registry = Registry.default()
    candidate = exact_version(adapter)
    current = registry.resolve(candidate.model, candidate.name)
    if require_eval is not None and current != candidate:
        from train_jobs.promotion import compare, ensure_not_worse

        with out.status(f"Asking versions {current.version} and {candidate.version}"):
            found = compare(find(adapter.partition(":")[0]), current, candidate, source=require_eval, metric=metric)
        ensure_not_worse(found, current, candidate)
        out.print(f"{metric} {found.current:.4f} → {found.candidate:.4f} on {found.num_samples} samples")
    registry.promote(candidate.model, candidate.name, candidate.version)
    out.print(f"{candidate.model}:{candidate.name} now means version {candidate.version}.")


@app.command()
def doctor() -> None:
    """Say what works on this machine, what does not, and why."""
    from cluster.doctor import check_machine

    for check in check_machine():
        out.print(f"{'[green]✔' if check.works else '[yellow]✘'}[/] {check.name}: {check.detail}")


def check_precision(precision: str | None) -> Any:
    """Return `precision` if there is such a one; raises a usage error naming those there are."""
    known = get_args(Precision)
    if precision is not None and precision not in known:
        raise UserError(f"There is no precision {precision!r}; choose one of {', '.join(known)}.")
    return precision


def main() -> NoReturn:
    """Run the command; an error of the user's is one line on stderr and exit code 2, `--debug` shows where."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app(args=arguments, prog_name="kajiya")
    except UserError as error:
        if debug:
            raise
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _report(error: UserError) -> int:
    Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return 2


def _served(dashboard_url: str) -> dict[str, Any]:
    # Ray's clients read at their import whether there is a token; the first start of all makes one.
    local_ray.use_token()
    from serve_apps.deploy import served_args

    return served_args(dashboard_url)


def _hardware(gpu: str | None, num_gpus: int) -> Hardware:
    return declared(gpu=gpu, num_gpus=num_gpus) if gpu else detect()


def print_doors(port: int, dashboard_url: str, model: str, question: str = "Hello!") -> None:
    """Print where endpoint, playground and dashboard are, and a `curl` line that asks `model` a question."""
    page = f"http://127.0.0.1:{port}/"
    api = f"{page}v1"
    # Greedy, for what a small model says at OpenAI's default of 1 is a bad first impression.
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    body = json.dumps(asked, ensure_ascii=False)
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_keys() else ""
    curl = f"curl {api}/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'"
    doors = f"API        {api}\nPlayground {page}\nDashboard  {dashboard_url}\n"
    doors += f"Try        {curl}\nStop       kajiya down"
    if not header:
        doors += "\nKeys       open on this machine only: no keys; create one with `kajiya keys create NAME`"
    out.print(doors, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
