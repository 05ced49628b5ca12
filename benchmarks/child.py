"""Measurements in a process of their own, so that neither memory nor threads are another one's."""

import json
import subprocess
import sys
from typing import Any


def run_module(module: str, *arguments: str) -> Any:
    """Run `python -m module arguments` and return the JSON of its last line; what it says else goes nowhere.

    Raises:
        subprocess.CalledProcessError: It failed; its stderr has been seen.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
