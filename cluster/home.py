"""Where Kajiya keeps its state."""

import os
from pathlib import Path


def kajiya_home() -> Path:
    """Return `KAJIYA_HOME`, or `~/.cache/kajiya`; the folder need not exist yet."""
    return Path(os.environ.get("KAJIYA_HOME") or "~/.cache/kajiya").expanduser()
