import pytest

from serve_apps.reasoning import Thinking, ThinkStream, thinking_of


def read(text: str, thinking: Thinking, cuts: list[int]) -> tuple[str, str]:
    stream = ThinkStream(thinking)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    both = [stream.push(piece, is_last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return "".join(r for r, _ in both), "".join(c for _, c in both)


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        ("may_begin", "<think>\nHm </ <b.\n</think>\n\nSo: 4 < 5", "Hm </ <b.\n", "So: 4 < 5"),
        ("may_begin", "\n<think>Hm</think>4", "Hm", "4"),
        ("may_begin", "4, and <think> is a tag", "", "4, and <think> is a tag"),
        ("may_begin", " <thi", "", " <thi"),
        ("may_begin", "<think>Hm", "Hm", ""),
        ("may_begin", "<think>Hm</thi", "Hm</thi", ""),
        ("may_begin", "<think></think>4 </think>", "", "4 </think>"),
        ("has_begun", "Hm</think>\n\n4", "Hm", "4"),
        ("has_begun", "Hm", "Hm", ""),
        ("never", "<think>Hm</think>4", "", "<think>Hm</think>4"),
    ],
)
def test_thinking_is_taken_out_of_the_text_however_it_is_cut(
    thinking: Thinking, text: str, reasoning: str, content: str
) -> None:
    assert read(text, thinking, []) == (reasoning, content)
    for step in (1, 2, 3, 5):
        assert read(text, thinking, list(range(step, len(text), step))) == (reasoning, content)
    for cuts in ([place] for place in range(1, len(text))):
        assert read(text, thinking, cuts) == (reasoning, content)


def test_thinking_is_given_out_while_it_lasts() -> None:
    stream = ThinkStream("has_begun")
    assert stream.push("Let me see", is_last=False) == ("Let me see", "")


def test_a_model_thinks_when_its_template_knows_the_end_of_thinking() -> None:
    # the line with which the distilled DeepSeek models drop earlier thoughts from a conversation
    template = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    assert thinking_of(template, "<|User|>Hi<|Assistant|>") == "may_begin"
    assert thinking_of(template, "<|User|>Hi<|Assistant|><think>\n") == "has_begun"
    assert thinking_of(template, "<|User|>Hi<|Assistant|><think>\n\n</think>\n\n") == "may_begin"
    assert thinking_of("{{ messages }}", "<think>") == "never"
