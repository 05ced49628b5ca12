"""`kajiya adapters …` in this process, on a registry of its own; the endpoint is a socket that says what it is told."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from registered import manifest_of, peft_folder, plain_manifest
from tiny_models import lively_tiny_folder
from typer.testing import CliRunner

from cluster.alias import Canary
from cluster.catalog import find
from cluster.errors import UserError
from cluster.pins import TooManyPins
from cluster.registry import AdapterInUse, Registry, UnknownAdapter
from kajiya import app
from train_jobs.promotion import NotBetter

MODEL = "smollm2-135m-instruct"
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """`shop` with versions 1 and 2, `poet` with version 1."""
    monkeypatch.setenv("KAJIYA_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    registry = Registry.default()
    for name in ("shop", "shop", "poet"):
        registry.add(tmp_path / "adapter", plain_manifest(name).model_copy(update={"model": MODEL}))
    return registry


@pytest.fixture
def endpoint() -> Iterator[tuple[str, dict[str, Any]]]:
    """An address, and what is answered there to a `GET`."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer["path"], answer["key"] = self.path, self.headers.get("Authorization")
            body = json.dumps(answer["body"]).encode()
            self.send_response(answer.get("status", 200))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answer
    server.shutdown()
    thread.join()
    server.server_close()


def kajiya(*words: str) -> str:
    done = CliRunner().invoke(app, ["adapters", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_life_on_the_command_line(registry: Registry) -> None:
    assert "now means version 1" in kajiya("promote", f"{MODEL}:shop@1")
    assert "10% of the users" in kajiya("canary", f"{MODEL}:shop@2", "--percent", "10")
    assert registry.alias(MODEL, "shop").canary == Canary(version=2, percent=10)
    listed = kajiya("list")
    assert "canary 10%" in listed
    with pytest.raises(AdapterInUse, match="tries version 2"):
        kajiya("rm", f"{MODEL}:shop@2")
    assert "means version 1 again, for everybody" in kajiya("rollback", f"{MODEL}:shop")
    assert "stays in memory" in kajiya("pin", f"{MODEL}:shop", "--base-url", NOBODY)
    assert "current, pinned" in kajiya("list")
    kajiya("unpin", f"{MODEL}:shop")
    assert not registry.alias(MODEL, "shop").is_pinned
    assert "Deleted" in kajiya("rm", f"{MODEL}:shop")
    assert registry.names(MODEL) == ("poet",)


def test_a_second_candidate_takes_the_place_of_the_first_and_says_so(registry: Registry, tmp_path: Path) -> None:
    registry.add(tmp_path / "adapter", plain_manifest("shop").model_copy(update={"model": MODEL}))  # version 3
    assert "no longer" not in kajiya("canary", f"{MODEL}:shop@2", "--percent", "10")
    assert "no longer" not in kajiya("canary", f"{MODEL}:shop@2", "--percent", "20")
    assert "version 2 is tried no longer" in kajiya("canary", f"{MODEL}:shop@1", "--percent", "10")
    assert registry.alias(MODEL, "shop").canary == Canary(version=1, percent=10)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("promote", f"{MODEL}:shop"), UserError, "names no version"),
        (("promote", f"{MODEL}:shop@9"), UnknownAdapter, "there are shop@1, shop@2"),
        (("canary", f"{MODEL}:shop", "--percent", "5"), UserError, "names no version"),
        (("rollback", f"{MODEL}:poet"), UnknownAdapter, "nothing to roll back to"),
        (("pin", f"{MODEL}:nobody", "--base-url", NOBODY), UnknownAdapter, "no adapter 'nobody'"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_what_cannot_be_done_is_said(words: tuple[str, ...], kind: type[UserError], message: str) -> None:
    with pytest.raises(kind, match=message):
        kajiya(*words)


def test_pins_ask_the_endpoint_what_its_replicas_hold(
    registry: Registry, endpoint: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answer = endpoint
    answer["body"] = {"max_loras": 1}
    monkeypatch.setenv("KAJIYA_API_KEY", "kj-secret")
    with pytest.raises(TooManyPins, match="holds 1 adapters"):
        kajiya("pin", f"{MODEL}:shop", "--base-url", url)
    assert answer["path"] == f"/v1/adapters/{MODEL}:shop@2"
    assert answer["key"] == "Bearer kj-secret"
    assert not registry.alias(MODEL, "shop").is_pinned


@pytest.mark.usefixtures("registry")
def test_show_has_the_counts_of_the_endpoint(endpoint: tuple[str, dict[str, Any]]) -> None:
    url, answer = endpoint
    times = {"p50": 0.125, "p90": 0.25, "p99": 0.5}
    one = {"version": 2, "num_requests": 41, "num_errors": 3, "num_prompt_tokens": 5, "num_completion_tokens": 999}
    answer["body"] = {"counts": [one | {"seconds": times, "first_token_s": None, "token_s": times}]}
    said = kajiya("show", f"{MODEL}:shop", "--base-url", url)
    assert "means version 2" in said
    assert "125/250/500" in said
    assert {"2", "41", "3", "999", "-"} <= set(said.splitlines()[-1].split())
    shown = json.loads(kajiya("show", f"{MODEL}:shop@1", "--base-url", url, "--json"))
    assert shown["manifest"]["version"] == 1
    assert shown["counts"][0]["num_requests"] == 41


@pytest.mark.usefixtures("registry")
def test_show_says_why_there_are_no_counts(endpoint: tuple[str, dict[str, Any]]) -> None:
    assert "No endpoint answers" in kajiya("show", f"{MODEL}:shop", "--base-url", NOBODY)
    url, answer = endpoint
    answer.update(body={}, status=401)
    assert "answers 401" in kajiya("show", f"{MODEL}:shop", "--base-url", url)
    assert json.loads(kajiya("show", f"{MODEL}:shop", "--base-url", url, "--json"))["counts"] is None


def test_a_promotion_can_ask_for_an_evaluation(registry: Registry, tmp_path: Path) -> None:
    base = lively_tiny_folder(tmp_path / "tiny")
    card = find(str(base))
    for seed in range(2):
        registry.add(peft_folder(base, tmp_path / f"{seed}", seed=seed), manifest_of(card))
    line = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, good day."}]}
    (tmp_path / "eval.jsonl").write_text(json.dumps(line) + "\n")
    words = ("--require-eval", str(tmp_path / "eval.jsonl"))
    said = []
    for version in (1, 2):  # one of them is worse than the other
        registry.promote(card.name, "shop", 3 - version)
        try:
            said.append(kajiya("promote", f"{base}:shop@{version}", *words))
        except NotBetter as error:
            said.append(str(error))
        is_refused = "nothing was promoted" in said[-1]
        assert registry.alias(card.name, "shop").version == (3 - version if is_refused else version)
    assert sum("nothing was promoted" in one for one in said) == 1
    assert sum("now means version" in one for one in said) == 1
