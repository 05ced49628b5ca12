"""The playground: one page at `/`, put together from the files in `page/`, which loads nothing from elsewhere."""

import base64
import hashlib
from functools import cache
from importlib import resources

from starlette.responses import HTMLResponse

SCRIPTS = ("texts.js", "page.js", "server.js", "answers.js", "controls.js")


def playground() -> HTMLResponse:
    """Return the page, with a Content-Security-Policy that lets it run its own script and ask its own origin only.

    What a model writes is put into the page as text. Should a mistake ever make markup of it, the policy's hashes keep
    any script in it from running, and `connect-src` keeps the key from leaving.
    """
    page, policy = _page_and_policy()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(page, headers=headers)


@cache
def _page_and_policy() -> tuple[str, str]:
    style = _joined("style.css").replace(": ", ":").replace("; ", ";").replace(" { ", "{")
    script = _joined(*SCRIPTS)
    page = _joined("page.html").replace("/*style*/", style).replace("/*script*/", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of(script),
        "style-src": _hash_of(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in policy.items())


def _joined(*names: str) -> str:
    """Return the files one after the other, without indentation and lines of comment."""
    folder = resources.files("serve_apps") / "page"
    lines = (line.strip() for name in names for line in (folder / name).read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("// "))


def _hash_of(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
