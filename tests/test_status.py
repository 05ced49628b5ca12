"""What probes and the page are told of the models, from states that Serve's controller gave."""

import asyncio
import json
from dataclasses import replace

import pytest

from serve_apps import status
from serve_apps.states import ModelState
from serve_apps.status import Status, readiness, state_body


def state(model: str, **changes: object) -> ModelState:
    one = ModelState(
        model=model, status="HEALTHY", message="", num_running=1, num_starting=0, num_stopping=0,
        target_num_replicas=1, min_replicas=0, max_replicas=4, num_gpus=0.25, accelerator_type="L4", replicas=(),
    )  # fmt: skip
    return replace(one, **changes)  # type: ignore[arg-type]


RUNNING = state("a")
ASLEEP = state("b", num_running=0, target_num_replicas=0)
STARTING = state("b", num_running=0, num_starting=1)
FAILED = state("b", num_running=0, status="UNHEALTHY")


@pytest.mark.parametrize(
    ("other", "status_code", "word"),
    [
        (ASLEEP, 200, "at zero, wakes on request"),
        (STARTING, 503, "starting"),
        (FAILED, 503, "failed"),
        (None, 503, "starting"),
    ],
)
def test_ready_is_when_every_model_answers_or_would_wake(other: ModelState | None, status_code: int, word: str) -> None:
    answer = readiness(["a", "b"], [RUNNING, *([other] if other else [])])
    assert answer.status_code == status_code
    assert json.loads(bytes(answer.body))["num_models"] == {"ready": 1, word: 1}


def test_the_state_tells_replicas_and_shares_of_gpus_but_no_nodes() -> None:
    body = state_body([RUNNING], {"total": 8.0, "used": 0.25})
    assert body["gpus"] == {"total": 8.0, "used": 0.25}
    assert body["models"][0]["phase"] == "running"
    assert (body["models"][0]["num_gpus"], body["models"][0]["accelerator_type"]) == (0.25, "L4")
    assert "replicas" not in body["models"][0]


def test_a_client_is_told_of_the_models_that_it_may_know(monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(*_: object) -> list[ModelState]:
        return [RUNNING, ASLEEP]

    monkeypatch.setattr(status, "model_states", both)
    monkeypatch.setattr(status, "gpus", lambda: {"total": 8.0, "used": 0.25})
    answer = asyncio.run(Status({}, {}).state({"b"}.__contains__))
    assert [model["model"] for model in json.loads(bytes(answer.body))["models"]] == ["b"]
