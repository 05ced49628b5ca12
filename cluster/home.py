"""Where Kajiya keeps its state."""

import os
from pathlib import Path

from cluster.errors import UserError

KEY_VARIABLE = "KAJIYA_API_KEY"
"""Where commands that ask an endpoint, and the `curl` line that `kajiya up` prints, read a key."""


class HomeNotWritable(UserError, OSError):
    """State cannot be written where it belongs."""


def kajiya_home() -> Path:
    """Return `KAJIYA_HOME`, or `~/.cache/kajiya`; the folder need not exist yet."""
    return Path(os.environ.get("KAJIYA_HOME") or "~/.cache/kajiya").expanduser()


def make_home_folder(name: str = "") -> Path:
    """Return the folder `name` of `KAJIYA_HOME`, made if it is not there; raises `HomeNotWritable`."""
    folder = kajiya_home() / name
    reason = "Permission denied"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise HomeNotWritable(f"Cannot write {folder} ({reason}); set KAJIYA_HOME to a folder you can write.")
    return folder
