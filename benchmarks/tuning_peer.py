"""The documented way to search with Ray: a Tune driver that runs a `TorchTrainer` for each trial.

`python -m benchmarks.tuning_peer '{...}'` prints its numbers as the last line. Inside are transformers' `Trainer` and
PEFT, two trials at a time with one thread each, as Ray's guide to tuning Ray Train runs has it: the driver function
builds the trainer with a `TuneReportCallback`, and `max_concurrent_trials` keeps drivers from starving workers.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.processes import peak_of_processes
from benchmarks.tuning_clock import FIRST_STEP_AT, TrialClock
from benchmarks.tuning_search import MICRO_BATCH, SearchNumbers, SearchSettings

AT_A_TIME = 2


def train(config: dict[str, Any]) -> None:
    """Train one trial in a worker of Ray Train."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from cluster.catalog import find
    from cluster.presets import lora_preset

    torch.set_num_threads(1)
    settings, point = SearchSettings(**config["settings"]), config["point"]
    parts = json.loads(Path(settings.data).read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings.model_folder)
    model = AutoModelForCausalLM.from_pretrained(settings.model_folder, dtype=torch.float32)
    lora = LoraConfig(
        r=point["r"],
        lora_alpha=point["lora_alpha"],
        lora_dropout=lora_preset(find(settings.model)).lora_dropout,
        target_modules=list(find(settings.model).target_modules),
        task_type="CAUSAL_LM",
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=config["folder"],
            use_cpu=True,
            per_device_train_batch_size=MICRO_BATCH,
            max_steps=settings.num_steps,
            learning_rate=point["learning_rate"],
            warmup_steps=settings.num_warmup_steps,
            # Trials report when they evaluate and save: at the rungs.
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=settings.rungs[0],
            save_steps=settings.rungs[0],
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(parts["train"]),
        eval_dataset=Dataset.from_list(parts["held_out"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[rungs_callback(settings.rungs)],
    )
    trainer.add_callback(RayTrainReportCallback())
    prepare_trainer(trainer).train()


def rungs_callback(rungs: list[int]) -> Any:
    """Return what evaluates and saves at the rungs alone, and notes when the first step has been made."""
    from transformers import TrainerCallback

    class Rungs(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == 1:
                state.log_history.append({FIRST_STEP_AT: time.time()})
            control.should_evaluate = control.should_save = state.global_step in rungs

    return Rungs()


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial: the function that Ray Tune calls."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    name = ray.tune.get_context().get_trial_id()
    trainer = TorchTrainer(
        train,
        train_loop_config=config | {"folder": f"{config['folder']}/{name}"},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name=name, storage_path=f"{config['folder']}/train", callbacks=[TuneReportCallback()]),
    )
    trainer.fit()


def search(settings: SearchSettings, folder: str) -> SearchNumbers:
    """Return the numbers of a whole search."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    begin = time.time()
    # A core for each driver, too, as in the guide: they wait most of the time.
    context = ray.init("local", num_cpus=2 * AT_A_TIME)
    os.environ["RAY_ADDRESS"] = context.address_info["address"]  # processes of Ray Train look for it
    clock = TrialClock()
    scheduler = FIFOScheduler()
    if settings.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            grace_period=settings.rungs[0],
            max_t=settings.num_steps,
            reduction_factor=settings.reduction_factor,
        )
    shared = {"settings": asdict(settings), "folder": folder}
    with peak_of_processes() as peak:
        results = tune.Tuner(
            run_trial,
            param_space=shared | {"point": tune.grid_search(settings.points)},
            tune_config=tune.TuneConfig(
                metric="eval_loss", mode="min", scheduler=scheduler, max_concurrent_trials=AT_A_TIME
            ),
            run_config=tune.RunConfig(storage_path=f"{folder}/tune", callbacks=[clock], verbose=0),
        ).fit()
    return SearchNumbers(
        seconds=time.time() - begin,
        first_step_s=clock.first_step_s,
        begun_s=clock.begun_s,
        peak_bytes=peak.num_bytes,
        num_steps=[int(result.metrics["step"]) for result in results],
        held_out_losses=[float(result.metrics["eval_loss"]) for result in results],
        losses=[],
        points=list(settings.points),
    )


def main() -> None:
    """Run and print the numbers as the last line."""
    # By its name, not as `__main__`: workers import the module, where they would get parts of it that miss names.
    from benchmarks.tuning_peer import search

    settings = SearchSettings(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="kajiya-peer-") as folder:
        print(json.dumps(asdict(search(settings, folder))))


if __name__ == "__main__":
    main()
