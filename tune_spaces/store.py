"""Where a search keeps what it needs to go on after a crash."""

import pickle
import secrets
import time
from pathlib import Path

from cluster.errors import UserError
from cluster.home import kajiya_home, make_home_folder
from tune_spaces.arguments import SearchRequest

REQUEST_FILE = "request.pkl"


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
        UnknownSearch: There is none of that name.
    """
    folder = kajiya_home() / "searches"
    if not (folder / name / REQUEST_FILE).is_file():
        known = sorted(path.parent.name for path in folder.glob(f"*/{REQUEST_FILE}"))
        raise UnknownSearch(f"There is no search {name!r} in {folder}; there are {', '.join(known) or 'none'}.")
    request = pickle.loads((folder / name / REQUEST_FILE).read_bytes())  # noqa: S301 (our own file)
    assert isinstance(request, SearchRequest)
    return request
