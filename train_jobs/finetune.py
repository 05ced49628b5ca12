"""Fine-tune a model on chat data and register the adapter.

ray job submit -- python -m train_jobs.finetune --model smollm2-135m-instruct --data chats.jsonl --name support
"""

import sys
from collections.abc import Sequence

from cluster.catalog import find
from cluster.errors import UserError
from cluster.hardware import detect
from cluster.hub import ensure_available
from cluster.plan import plan_training
from cluster.registry import AdapterVersion, check_name
from train_jobs.arguments import Request, read_arguments
from train_jobs.data import read_data_file
from train_jobs.interrupt import treat_sigterm_as_ctrl_c
from train_jobs.progress import announce


def finetune(request: Request) -> AdapterVersion:
    """Plan, check, train, evaluate and register; returns the new version.

    Raises:
        UserError: Whatever the user can put right. All that is wrong with the request itself comes before a worker
            starts, and nothing is left behind.
    """
    card = find(request.model)
    check_name(request.name)
    plan = plan_training(
        card,
        detect(),
        method=request.method,
        precision=request.precision,
        overrides=request.overrides,
        max_length=request.max_length,
        num_workers=request.num_workers,
    )
    for path in filter(None, (request.data, request.eval_data)):
        read_data_file(path)
    ensure_available(card)

    # From here on it takes seconds: torch, transformers and Ray are imported.
    from train_jobs.checkpoint import adapter_folder
    from train_jobs.launch import launch, run_folder
    from train_jobs.prepare import build_job, describe, read_data
    from train_jobs.register import register

    with run_folder(request.name) as folder:
        data = read_data(request, plan)
        job = build_job(request, plan, data)
        for warning in plan.warnings:
            announce("warning", warning)
        announce("plan", describe(card, plan, job))
        use_gpu = plan.hardware.gpu is not None
        outcome, checkpoint = launch(job, folder, num_workers=plan.num_workers, use_gpu=use_gpu)
        version = register(adapter_folder(checkpoint, 0), request.name, plan=plan, job=job, data=data, outcome=outcome)
    before, after = outcome.before, outcome.after[0]
    announce(
        "registered",
        f"registered {version.served_name}: held-out loss {before.loss:.4f} -> {after.loss:.4f}. "
        f"It is served as {card.name}:{request.name}; ask it with `kajiya chat {card.name}:{request.name}`",
        version=version.served_name,
    )
    return version


def main(argv: Sequence[str]) -> int:
    """Run the command; an error of the user's is one line on stderr and exit code 2, `--debug` shows where."""
    treat_sigterm_as_ctrl_c()
    try:
        finetune(read_arguments(argv))
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: stopped; nothing was registered", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
