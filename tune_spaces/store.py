"""Where a search keeps what it needs to go on after a crash: its request, Ray Tune's state, and a line per report."""

import json
import pickle
import secrets
import time
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.home import kajiya_home, make_home_folder
from tune_spaces.arguments import SearchRequest

REQUEST_FILE = "request.pkl"
NOTES_FILE = "notes.jsonl"
REPORT_PAGE = "report.html"


class UnknownSearch(UserError, LookupError):
    """There is no search of that name to go on with."""


def searches_folder() -> Path:
    """Return the folder that holds one folder for each search.

    Raises:
        HomeNotWritable: It cannot be made.
    """
    return make_home_folder("searches")


def new_search(request: SearchRequest) -> str:
    """Make the folder of a new search and return its name, by which it is resumed."""
    name = f"{request.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = searches_folder() / name
    folder.mkdir()
    unfinished = folder / f"{REQUEST_FILE}.new"
    unfinished.write_bytes(pickle.dumps(request))
    unfinished.rename(folder / REQUEST_FILE)
    return name


def load_request(name: str) -> SearchRequest:
    """Return what was asked for when the search was started.

    Raises:
        UnknownSearch: There is none of that name, or it came to its end.
    """
    folder = kajiya_home() / "searches"
    known = sorted(path.parent.name for path in folder.glob(f"*/{REQUEST_FILE}"))
    if name not in known:
        raise UnknownSearch(f"There is no search {name!r} in {folder}; there are {', '.join(known) or 'none'}.")
    if (page := folder / name / REPORT_PAGE).is_file():
        raise UnknownSearch(f"The search {name} has come to its end; its report is {page}.")
    request = pickle.loads((folder / name / REQUEST_FILE).read_bytes())  # noqa: S301 (our own file)
    assert isinstance(request, SearchRequest)
    return request


def note(folder: Path, **what: Any) -> None:
    """Add a line: what a trial reported and has in its checkpoint, that it is over, or what was predicted."""
    with (folder / NOTES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(what, ensure_ascii=False) + "\n")


def predicted_s(folder: Path) -> float | None:
    """Return what the search was last predicted to take; None where no step was measured."""
    return next((line["predicted_s"] for line in reversed(notes(folder)) if "predicted_s" in line), None)


def notes(folder: Path) -> list[dict[str, Any]]:
    """Return what was noted, the oldest first; a line that a crash cut off is none."""
    path = folder / NOTES_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except ValueError:  # cut off by a crash, and continued by the next report
            continue
    return whole
