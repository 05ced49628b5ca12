"""What cannot be searched is refused in one line, before a base is loaded or Ray is started."""

import json

import pytest
import ray
from tiny_models import tiny_llama_folder

import tune_spaces.search
import tune_spaces.store
from cluster.hardware import Hardware
from cluster.memory import GIB
from tune_spaces.arguments import read_arguments
from tune_spaces.search import main
from tune_spaces.store import REPORT_PAGE, new_search


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that could be searched."""
    folder = tmp_path_factory.mktemp("input")
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab"}] for i in range(20)]
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return ["--model", str(tiny_llama_folder(folder / "tiny")), "--data", str(data), "--name", "best"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(**_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(ray, "init", started)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set-space r=8 --set-space lora_alpha=16 --set-space learning_rate=1e-4", "there is nothing to search"),
        ("--set-space learning_rate=1e-4..2", "learning_rate=2.0 is outside of its bounds, 1e-08 to 1"),
        ("--set-space lora_alpha=much", "lora_alpha=much is no number; its bounds are 1 to 4096"),
        ("--set-space max_length=64,4096", "max_length=4096 is not from 1 to 512"),
        ("--set-space micro_batch_size=2..8", "micro_batch_size takes whole numbers; list them"),
        ("--set-space rank=8,16", "There is no field 'rank' to search; choose from r, lora_alpha,"),
        ("--set-space r", "--set-space r: write it with =, as in --set-space r=8,16,32."),
        ("--space huge", "argument --space: invalid choice: 'huge' (choose from"),
        ("--objective accuracy", "There is no objective 'accuracy'; choose from held_out_loss, exact_match"),
        ("--trials 0", "argument --trials/--max-trials: 0 is not a count of at least 1"),
        ("--max-time soon", "argument --max-time: 'soon' is no time above 0, as 90s, 30m or 1h30m are"),
        ("--max-time 0m", "argument --max-time: '0m' is no time above 0"),
        ("--max-time 0.00001s", "--max-time 1e-05s is 1e-05 s, and one step of one trial takes at least"),
        ("--max-gpu-hours 1e-9", "--max-gpu-hours 1e-09 is 3.6e-06 s, and one step of one trial takes at least"),
        ("--max-gpu-hours -1", "argument --max-gpu-hours: -1 is not above 0"),
        ("--set batch=4", "batch"),
        ("--name a/b", "a/b"),
        ("--model no-such-model", "no-such-model"),
        ("--data absent.jsonl", "absent.jsonl: cannot read it"),
        ("--rank 8", "unrecognized arguments: --rank 8"),
        ("--resume gone", "There is no search 'gone' in"),
    ],
)
def test_bad_input_is_one_line(asked: list[str], words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*asked, *words.split()]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_space_that_no_memory_holds_is_refused(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = Hardware(gpu=None, num_gpus=0, num_cpus=2, ram_bytes=GIB // 4)
    monkeypatch.setattr(tune_spaces.search, "detect", lambda: small)
    assert main(asked) == 2
    assert "GiB" in capfd.readouterr().err


def test_a_search_that_has_ended_is_not_resumed(asked: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    request = read_arguments(asked)
    assert not isinstance(request, str)
    name = new_search(request)
    page = tune_spaces.store.searches_folder() / name / REPORT_PAGE
    page.write_text("done")
    assert main(["--resume", name]) == 2
    assert f"The search {name} has come to its end; its report is {page}" in capfd.readouterr().err
