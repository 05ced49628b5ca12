"""The playground in headless Chromium, with real clicks and keys; the answers come from `fake_endpoint`."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser
from fake_endpoint import HAIKU, KEY, MARKUP, MODELS, fake_app, served

pytestmark = pytest.mark.cluster

Bodies = list[dict[str, Any]]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def bodies() -> Bodies:
    """What the page asked, in order."""
    return []


@pytest.fixture
def url(bodies: Bodies) -> Iterator[str]:
    with served(fake_app(bodies)) as url:
        yield url


@pytest.fixture
def page(chromium: Browser, url: str) -> Iterator[Browser]:
    """The page as somebody sees it who comes for the first time, with English and a wide window."""
    chromium.resize(1200, 800)
    chromium.speak("en-US")
    chromium.open(url)
    chromium.wait_for("document.querySelectorAll('#states li').length === 2")
    yield chromium
    complaints = list(chromium.complaints)
    chromium.complaints.clear()
    chromium.evaluate("localStorage.clear(); sessionStorage.clear()")
    assert complaints == []


def say(page: Browser, text: str, *, num_done: int = 1) -> None:
    page.click("#prompt")
    page.write(text)
    page.press("Enter")
    page.wait_for(f"document.querySelectorAll('.answer.done').length === {num_done}")


def test_two_adapters_answer_the_same_prompt_side_by_side(page: Browser, bodies: Bodies) -> None:
    page.choose("#model-0", "tiny:shop")
    page.click("#compare")
    page.choose("#model-1", "tiny:poet")
    page.click("#temperature")
    page.write("0.5")
    page.click("#system")
    page.write("Be brief.")
    say(page, "hello", num_done=2)
    assert sorted(body["model"] for body in bodies) == ["tiny:poet", "tiny:shop"]
    for body in bodies:
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
        assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.5, 512, True)
        assert "top_p" not in body  # what is not set is the model's own
        assert "seed" not in body
    left, right = page.evaluate("[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().x)")
    assert left < right
    assert page.text(".answer h3") == "tiny:shop@3"  # the version that answered
    assert page.text(".answer > .text") == "You said: hello"
    assert page.text(".answer:nth-child(2) > .text") == HAIKU * 3
    assert re.search(r"first token [\d.]+ s · [\d.,]+ tokens/s · 40 tokens · [\d.]+ s", page.text(".answer footer"))


def test_an_adapter_that_is_registered_meanwhile_can_be_chosen(page: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "[...document.querySelectorAll('#model-0 option')].map(option => option.value).join()"
    page.choose("#model-0", "tiny:shop")
    assert page.evaluate(options) == "tiny,tiny:shop,tiny:poet,large-instruct"
    monkeypatch.setattr("fake_endpoint.MODELS", [*MODELS, ("tiny:cook", "tiny")])
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    page.wait_for(f"{options} === 'tiny,tiny:shop,tiny:poet,tiny:cook,large-instruct'")
    assert page.evaluate("document.querySelector('#model-0').value") == "tiny:shop"


def test_each_side_goes_on_with_its_own_conversation(page: Browser, bodies: Bodies) -> None:
    page.click("#compare")
    page.choose("#model-1", "tiny:poet")
    say(page, "one", num_done=2)
    say(page, "two", num_done=4)
    said = {body["model"]: [m["content"] for m in body["messages"]] for body in bodies[2:]}
    assert said == {"tiny": ["one", "You said: one", "two"], "tiny:poet": ["one", HAIKU * 3, "two"]}
    page.click("#new")
    say(page, "three")
    assert [m["content"] for m in bodies[-1]["messages"]] == ["three"]


def test_what_a_model_writes_is_text_and_the_policy_keeps_scripts_out(page: Browser) -> None:
    say(page, "markup")
    assert page.text(".answer > .text") == MARKUP
    assert page.evaluate("document.querySelector('.answer').querySelectorAll('img, script, b').length") == 0
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    assert page.evaluate("document.title") == "Kajiya 鍛冶屋"
    assert "Content Security Policy" in page.complaints.pop()


def test_thoughts_are_folded(page: Browser) -> None:
    say(page, "think")
    assert page.text(".answer > .text") == "Tokyo it is."
    assert "Surely" not in page.text(".answer")
    page.click(".thinking summary")
    page.wait_for("document.querySelector('.answer').innerText.includes('Surely Tokyo.')")


def test_stop_ends_a_stream_and_keeps_what_there_is(page: Browser, bodies: Bodies) -> None:
    page.click("#prompt")
    page.write("long")
    page.press("Enter")
    page.wait_for("document.querySelector('.answer > .text')?.textContent.length > 30")
    assert page.text("#send") == "Stop"
    page.press("Escape")
    page.wait_for("document.querySelector('.answer.done')")
    assert "stopped" in page.text(".answer footer")
    assert page.text("#send") == "Send"
    say(page, "and then?", num_done=2)
    assert HAIKU in bodies[-1]["messages"][1]["content"]


def test_errors_are_shown_as_the_api_says_them_and_the_prompt_comes_back(page: Browser) -> None:
    page.choose("#model-0", "large-instruct")
    assert "at zero, wakes on request" in page.text("#now")
    say(page, "hello")
    assert page.text(".answer .error").startswith("large-instruct is being loaded.")
    assert "503 · model_not_ready · try again in 5 s · request " in page.text(".answer small")
    assert page.evaluate("document.querySelector('#prompt').value") == "hello"
    page.click("#new")
    page.choose("#model-0", "tiny")
    page.evaluate("document.querySelector('#prompt').value = ''")
    say(page, "cut")
    assert page.text(".answer .error") == "The connection ended before the answer did."


def test_japanese_comes_from_the_browser_and_a_composition_is_not_sent(page: Browser, url: str, bodies: Bodies) -> None:
    page.speak("ja-JP")
    page.open(url)
    page.wait_for("document.querySelectorAll('#states li').length === 2")
    assert page.text("#send") == "送信"
    assert page.evaluate("document.documentElement.lang") == "ja"
    page.click("#prompt")
    page.call("Input.imeSetComposition", text="にほん", selectionStart=3, selectionEnd=3)
    page.press("Enter", windowsVirtualKeyCode=229)
    assert bodies == []
    page.call("Input.insertText", text="日本")  # the end of the composition
    page.press("Enter")
    page.wait_for("document.querySelector('.answer.done')")
    assert bodies[0]["messages"][0]["content"] == "日本"
    page.click("#language")
    assert page.text("#send") == "Send"
    page.open(url)
    assert page.text("#send") == "Send"  # it is remembered


def test_a_key_is_asked_for_and_stays_in_the_tab(page: Browser, bodies: Bodies) -> None:
    with served(fake_app(bodies, needs_key=True)) as guarded:
        page.open(guarded)
        page.wait_for("!document.querySelector('#notice').hidden")
        assert page.text("#notice") == "Missing or unknown API key."
        page.wait_for("document.activeElement.id === 'key'")
        assert page.text("#hint") == "Missing or unknown API key."
        page.write(KEY)
        page.press("Tab")
        page.wait_for(
            "document.querySelectorAll('#states li').length === 2 && document.querySelector('#notice').hidden"
        )
        say(page, "hello")
        assert page.text(".answer > .text") == "You said: hello"
        assert page.evaluate("sessionStorage.getItem('key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + location.href + document.cookie")
        page.click("#request summary")
        assert '-H "Authorization: Bearer $KAJIYA_API_KEY"' in page.text("#curl")
        assert KEY not in page.text("#curl")
        page.evaluate("sessionStorage.clear()")


def test_the_request_as_curl_is_the_one_that_is_sent(page: Browser, url: str, bodies: Bodies) -> None:
    page.click("#request summary")
    page.click("#prompt")
    page.write("it's")
    command = page.text("#curl")
    assert command.startswith(f"curl -N {url}/v1/chat/completions")
    shown = json.loads(re.search(r"-d '(.*)'$", command, re.DOTALL)[1].replace("'\\''", "'"))  # type: ignore[index]
    page.press("Enter")
    page.wait_for("document.querySelector('.answer.done')")
    assert bodies == [shown]


def test_a_phone_shows_everything_in_its_width(page: Browser, url: str) -> None:
    page.resize(390, 844, is_phone=True)
    page.open(url)
    page.wait_for("document.querySelectorAll('#states li').length === 2")
    page.click("#compare")
    page.click("#prompt")
    page.write("hello " * 40 + "x" * 80)
    page.click("#send")
    page.wait_for("document.querySelectorAll('.answer.done').length === 2")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("[...document.querySelectorAll('.answer')].every(a => a.scrollWidth <= a.clientWidth + 2)")
    assert page.evaluate("document.querySelector('#panel').checkVisibility()") is False
    page.click("#panel-button")
    page.wait_for("document.querySelector('#panel').checkVisibility()")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.click("#panel-button")
    assert page.evaluate("document.querySelector('main').inert") is False
    small = "[...document.querySelectorAll('button, select, textarea, input')].filter(b => b.checkVisibility())"
    assert page.evaluate(f"{small}.every(b => b.getBoundingClientRect().height >= 24)")
