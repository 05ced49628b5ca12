"""Measurements in a process of their own, so that neither memory nor threads are another one's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def run_module(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run `python -m module arguments` and return the JSON of its last line; what it says else goes nowhere.

    `environment` is what it has beside that of this process.

    Raises:
        subprocess.CalledProcessError: It failed; its stderr has been seen.
    """
    command = [sys.executable, "-m", module, *arguments]
    own = os.environ | dict(environment or {})
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=own)
    return json.loads(done.stdout.splitlines()[-1])
