"""Measurements in a process of their own, so that neither memory nor threads are another one's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def run_module(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run `python -m module arguments` and return its last line that is a JSON object; what it says else goes nowhere.

    Not simply its last line: Ray forwards what workers say on their way out after it.

    `environment` is what it has beside that of this process.

    Raises:
        subprocess.CalledProcessError: It failed; its stderr has been seen.
    """
    command = [sys.executable, "-m", module, *arguments]
    own = os.environ | dict(environment or {})
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=own)
    return next(found for line in reversed(done.stdout.splitlines()) if (found := _as_object(line)) is not None)


def _as_object(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
