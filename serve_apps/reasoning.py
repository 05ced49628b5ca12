"""The part of an answer in which the model thinks aloud, `<think>…</think>`, taken out of the text as it comes."""

from typing import Literal

BEGIN, END = "<think>", "</think>"

Thinking = Literal["never", "may_begin", "has_begun"]
"""Whether an answer may hold a thinking part, and whether the prompt has opened it already."""


class ThinkStream:
    """Splits an answer's text into reasoning and content; what it has given out is never taken back."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._held = ""
        self._is_begin = True  # of the reasoning or of the content: the line breaks around the tags are neither

    def push(self, text: str, *, is_last: bool) -> tuple[str, str]:
        """Return the reasoning and the content that are certain now; at the end nothing is held back."""
        text, self._held = self._held + text, ""
        if self._thinking == "may_begin":
            text = self._begin(text, is_last=is_last)
        if self._thinking != "has_begun":
            return "", self._stripped(text)
        thought, rest, is_over = cut(text, END)
        if is_over:
            reasoning = self._stripped(thought)
            self._thinking, self._is_begin = "never", True
            return reasoning, self._stripped(rest)
        self._held = "" if is_last else rest
        return self._stripped(thought + rest if is_last else thought), ""

    def _begin(self, text: str, *, is_last: bool) -> str:
        """Return what follows once it is clear whether the answer begins with thinking."""
        begun = text.lstrip()
        if begun.startswith(BEGIN):
            self._thinking = "has_begun"
            return begun.removeprefix(BEGIN)
        if BEGIN.startswith(begun) and not is_last:
            self._held = text
            return ""
        self._thinking, self._is_begin = "never", False
        return text

    def _stripped(self, text: str) -> str:
        if self._is_begin:
            text = text.lstrip()
            self._is_begin = not text
        return text


def thinking_of(template: str, prompt: str) -> Thinking:
    """Return whether a model with this chat template thinks aloud; `prompt` is the rendered conversation."""
    if END not in template:
        return "never"
    return "has_begun" if prompt.rstrip().endswith(BEGIN) else "may_begin"


def cut(text: str, tag: str) -> tuple[str, str, bool]:
    """Return what is before `tag`, what follows, and True; without it, what is certain and what may begin the tag."""
    before, found, after = text.partition(tag)
    if found:
        return before, after, True
    num_held = next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
    return text[: len(text) - num_held], text[len(text) - num_held :], False
