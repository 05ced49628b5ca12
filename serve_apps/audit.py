"""One line of JSON per request: who asked what of whom, and what it took; never what was said."""

import json
import logging
from datetime import UTC, datetime
from functools import cache
from logging.handlers import RotatingFileHandler

from cluster.home import HomeNotWritable, make_home_folder
from serve_apps.call import Call
from serve_apps.gate import is_open

MAX_FILE_BYTES = 32 * 2**20
"""About 80,000 requests."""
NUM_OLD_FILES = 9


def audit(call: Call) -> None:
    """Write the line of a request that is over; probes and the empty page leave none.

    In a file of its own under `KAJIYA_HOME/logs`, which outlives the cluster, unlike Ray's logs. It is written at once
    and not by a thread: a line costs some 20 µs, and none is lost with the process.
    """
    if not is_open(call.method, call.path):
        _logger().info(json.dumps(line_of(call), ensure_ascii=True))


def line_of(call: Call) -> dict[str, object]:
    """Return the line's fields. Everything that a client may write freely is bounded or left out."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": call.request_id,
        "key_id": call.key_id,
        "client": call.client,
        "method": call.method,
        "path": call.path[:200],
        "model": call.model,
        "adapter": call.adapter,
        "version": call.version,
        "status": call.status,
        "error_code": call.error_code,
        "num_prompt_tokens": call.num_prompt_tokens,
        "num_completion_tokens": call.num_completion_tokens,
        "first_token_s": call.first_token_s and round(call.first_token_s, 4),
        "seconds": round(call.seconds, 4),
    }


def _handler() -> logging.Handler:
    try:
        file = make_home_folder("logs") / "audit.jsonl"
    except HomeNotWritable as error:
        logging.getLogger(__name__).warning("%s Until then, audit lines go to this log.", error)
        return logging.StreamHandler()
    return RotatingFileHandler(file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8")


@cache
def _logger() -> logging.Logger:
    logger = logging.getLogger("kajiya.audit")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    handler = _handler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    return logger
