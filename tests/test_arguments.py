"""The command line of the fine-tuning job."""

import pytest

from train_jobs.arguments import read_arguments
from train_jobs.command_line import UsageError

NEEDED = ["--model", "m", "--data", "d.jsonl", "--name", "n"]


def test_what_is_not_given_is_left_to_the_plan() -> None:
    request = read_arguments(NEEDED)
    assert (request.model, request.data, request.name) == ("m", "d.jsonl", "n")
    assert (request.eval_data, request.max_steps, request.method, request.precision) == (None, None, None, None)
    assert (request.max_length, request.num_workers, request.seed, request.overrides) == (None, None, 0, {})


def test_settings_keep_their_text() -> None:
    request = read_arguments([*NEEDED, "--set", "r=8", "--set", "target_modules=q_proj,v_proj", "--set", "x=a=b"])
    assert request.overrides == {"r": "8", "target_modules": "q_proj,v_proj", "x": "a=b"}


BAD = [
    (["--model", "m"], "--data, --name"),
    ([*NEEDED, "--epoch", "1"], "--epoch"),
    ([*NEEDED, "--epochs", "0"], "0 is not above 0"),
    ([*NEEDED, "--epochs", "nan"], "nan is not above 0"),
    ([*NEEDED, "--max-steps", "-1"], "-1 is not a count"),
    ([*NEEDED, "--num-workers", "two"], "two"),
    ([*NEEDED, "--precision", "fp8"], "fp8"),
    ([*NEEDED, "--set", "r"], "--set r: write it as field=value"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_a_wrong_argument_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_arguments(words)
    assert "\n" not in str(caught.value)
