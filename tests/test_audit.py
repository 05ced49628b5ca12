import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from gated import Gated

from serve_apps import audit


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KAJIYA_HOME", str(tmp_path / "home"))
    yield tmp_path / "home" / "logs" / "audit.jsonl"
    close()


def close() -> None:
    logger = logging.getLogger("kajiya.audit")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    audit._logger.cache_clear()


def test_a_request_leaves_one_line_without_what_was_said(tmp_path: Path, log: Path) -> None:
    close()
    gated = Gated(tmp_path)
    token = gated.key("ci", requests_per_minute=2)
    gated.chat(token, messages="a secret", used=7)
    gated.chat(token, messages="a secret", refused=True)
    gated.chat(token, messages="a secret")
    gated.get(path="/v1/models?messages=a+secret", headers={"x-request-id": 'x","status":200,"y":"'})
    gated.get(path="/health")
    for call in gated.calls:
        audit.audit(call)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (record,) = gated.store.list()
    assert [(line["status"], line["error_code"], line["key_id"]) for line in lines] == [
        (200, None, record.id),
        (400, None, record.id),
        (429, "rate_limit_exceeded", record.id),
        (401, "invalid_api_key", None),
    ]
    assert lines[0]["num_completion_tokens"] == 7
    assert lines[0]["client"] == "203.0.113.7"
    assert set(lines[0]) == {
        *("time", "request_id", "key_id", "client", "method", "path", "model", "adapter", "version", "status"),
        *("error_code", "num_prompt_tokens", "num_completion_tokens", "first_token_s", "seconds"),
    }
    assert "secret" not in log.read_text()
    assert token[16:] not in log.read_text()


def test_a_folder_that_cannot_be_written_fails_no_request(
    tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    close()
    (tmp_path / "home").write_text("a file")
    gated = Gated(tmp_path)
    gated.get(gated.key())
    audit.audit(gated.calls[0])
    assert "audit lines go to this log" in caplog.text
    assert '"status": 200' in capfd.readouterr().err
