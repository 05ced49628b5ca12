"""The page as it is served: small, complete, and without a way to anywhere else. `test_browser` uses it."""

import base64
import hashlib
import re

import pytest
from starlette.responses import HTMLResponse

from serve_apps.playground import playground

POLICY_OF_NOTHING = {"default-src", "base-uri", "form-action", "frame-ancestors"}


@pytest.fixture
def page() -> HTMLResponse:
    return playground()


def policy_of(page: HTMLResponse) -> dict[str, str]:
    parts = page.headers["content-security-policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


def test_the_page_is_small_and_loads_nothing_from_elsewhere(page: HTMLResponse) -> None:
    html = bytes(page.body).decode()
    assert len(page.body) < 25 * 1024
    assert html.startswith("<!doctype html>")
    assert set(re.findall(r"https?://[^'\s]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.(?!data:)", html) == []
    assert "@import" not in html


def test_the_policy_allows_this_style_and_script_alone_and_questions_to_this_server(page: HTMLResponse) -> None:
    html, policy = bytes(page.body).decode(), policy_of(page)
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        assert len(contents) == 1
        digest = base64.b64encode(hashlib.sha256(contents[0].encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    assert {name for name, value in policy.items() if value == "'none'"} == POLICY_OF_NOTHING
    assert not re.search(r"\s(?:on\w+|style)=", html)  # the policy would keep them out


def test_the_page_makes_no_markup_of_text(page: HTMLResponse) -> None:
    html = bytes(page.body).decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function", html)


def test_both_languages_say_the_same_things(page: HTMLResponse) -> None:
    html = bytes(page.body).decode()
    english, japanese = html[html.index("en: {") : html.index("ja: {")], html[html.index("ja: {") : html.index("};")]
    keys = [re.findall(r"(?:^|[{,]\s*)(\w+): [\"(]", text, re.MULTILINE) for text in (english, japanese)]
    assert keys[0] == keys[1]
    used = set(re.findall(r"\bt\.(\w+)", html)) | set(re.findall(r"data-(?:t|label|placeholder)=\"(\w+)\"", html))
    assert used - set(keys[0]) == set()
