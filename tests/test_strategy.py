"""Every strategy on two workers trains as one process does, and goes on where any other one was left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from strategy_processes import Part, Trained, forget, train, train_together
from test_pack import adapter, job_of
from tiny_models import byte_tokenizer, tiny_llama_folder

from cluster.catalog import find
from cluster.presets import zero_optimization
from train_jobs.job import NO_ADAPTER, Question, TrainJob

pytestmark = pytest.mark.cluster

NUM_STEPS, HALF = 8, 4
KINDS = ("lora", "full")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
GOES_ON = {"zero3": "zero3", "zero2": "ddp", "ddp": "fsdp", "fsdp": "zero3"}
"""Strategy of the second half of a run -> of the first half."""


def jobs_for(folder: Path) -> dict[str, TrainJob]:
    """Return the job of each kind; three questions cannot be dealt evenly to two workers."""
    # A tied head, and tensors that two workers cannot halve evenly.
    odd = {"vocab_size": 259, "hidden_size": 63, "intermediate_size": 127, "head_dim": 10}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    card = find(str(tiny_llama_folder(folder / "tiny", seed=1, **odd, **heads)))
    prompt_ids = tuple(byte_tokenizer()("<|im_start|>hi").input_ids)
    question = Question(prompt_ids=prompt_ids, answer_contains="\ufffe", max_new_tokens=3)
    noisy = replace(adapter(1, dropout=0.1, steps=NUM_STEPS), neftune_noise_alpha=0.3)
    lora = replace(job_of(card, noisy, accumulation=2), questions=(question,) * 3)
    return {"lora": lora, "full": replace(lora, adapters=(replace(lora.adapters[0], spec=NO_ADAPTER),))}


def shared_by(job: TrainJob, strategy: str) -> TrainJob:
    if not strategy.startswith("zero"):
        return replace(job, strategy="fsdp" if strategy == "fsdp" else "ddp")
    section = zero_optimization(stage=int(strategy[-1]), offload_optimizer=False, offload_param=False)
    # By default, ZeRO-3 leaves tensors as small as all of these whole.
    return replace(job, strategy="deepspeed", deepspeed_zero=section | {"stage3_param_persistence_threshold": 100})


def parts_of(jobs: dict[str, TrainJob]) -> dict[str, Part]:
    whole = {
        f"{kind}-{strategy}": Part(job=shared_by(jobs[kind], strategy), steps=range(NUM_STEPS))
        for kind in KINDS
        for strategy in STRATEGIES
    }
    first = {
        f"{kind}-{strategy}-half": replace(whole[f"{kind}-{strategy}"], steps=range(HALF))
        for kind in KINDS
        for strategy in sorted(set(GOES_ON.values()))
    }
    second = {
        f"{kind}-{strategy}-resumed": Part(
            job=shared_by(jobs[kind], strategy), steps=range(HALF, NUM_STEPS), after=f"{kind}-{begun}-half"
        )
        for kind in KINDS
        for strategy, begun in GOES_ON.items()
    }
    return whole | first | second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Trained]:
    """What one process gives; as many chunks of a batch are drawn as by two workers."""
    trained = {
        kind: train(Part(job=replace(job, gradient_accumulation_steps=4), steps=range(NUM_STEPS)), kind, folder)
        for kind, job in jobs_for(folder).items()
    }
    forget()
    return trained


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[str, Trained]:
    return train_together(parts_of(jobs_for(folder)), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.rglob("*.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_train_as_one_process(
    kind: str, strategy: str, alone: dict[str, Trained], together: dict[str, Trained], folder: Path
) -> None:
    one, two = alone[kind], together[f"{kind}-{strategy}"]
    assert one.losses[-1] < one.losses[0] - 0.1
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    assert two.before.loss == pytest.approx(one.before.loss, abs=1e-5)
    assert two.after.loss == pytest.approx(one.after.loss, abs=1e-5)
    assert two.after.answers == one.after.answers
    expected, written = weights(folder / kind), weights(folder / f"{kind}-{strategy}")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", GOES_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_under_the_same_strategy_and_under_another(
    kind: str, strategy: str, alone: dict[str, Trained], together: dict[str, Trained]
) -> None:
    resumed = together[f"{kind}-{strategy}-resumed"]
    assert resumed.losses == pytest.approx(alone[kind].losses[HALF:], abs=1e-5)
    assert resumed.after.loss == pytest.approx(alone[kind].after.loss, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_workers_left_under_zero_3_goes_on_in_one_process(
    kind: str, alone: dict[str, Trained], together: dict[str, Trained], folder: Path
) -> None:
    assert f"{kind}-zero3-half" in together
    job = replace(jobs_for(folder)[kind], gradient_accumulation_steps=4)
    resumed = train(Part(job=job, steps=range(HALF, NUM_STEPS), after=f"{kind}-zero3-half"), f"{kind}-alone", folder)
    forget()
    assert resumed.losses == pytest.approx(alone[kind].losses[HALF:], abs=1e-5)
