"""What Ollama is given so that it writes the very prompt that was trained and is served: a Go template and stop words.

The source is the Jinja template of the model's tokenizer. A family is a Jinja file and a Go file that say the same; the
tokenizer's template belongs to the family whose Jinja renders the same conversations to the same text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

from cluster import chat_templates
from cluster.errors import UserError

Messages = list[dict[str, str]]

SYSTEM = {"role": "system", "content": "簡潔に答えてください。"}
ASK = {"role": "user", "content": "日本の首都は?\nOne word."}
ANSWER = {"role": "assistant", "content": "東京です。"}
CONVERSATIONS: tuple[Messages, ...] = (
    [ASK],
    [SYSTEM, ASK],
    [ASK, ANSWER, ASK],
    [SYSTEM, ASK, ANSWER, ASK, ANSWER, ASK],
)
"""Prompts by which templates are told apart: one turn and several, with and without a system prompt."""


class NoOllamaTemplate(UserError, LookupError):
    """No Go template is known that writes this model's prompts."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    chat_template: Any
    bos_token: Any
    eos_token: Any
    bos_token_id: Any
    apply_chat_template: Callable[..., Any]
    convert_ids_to_tokens: Callable[..., Any]

    def __call__(self, text: str) -> Any:
        """Return the text's ids with the special tokens that the tokenizer adds by itself."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OllamaTemplate:
    """The `TEMPLATE` of a Modelfile, and its `PARAMETER stop` lines."""

    template: str
    """A Go template over `.Messages` and `.System`; ends where the answer begins."""
    stop: tuple[str, ...]


def ollama_template(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> OllamaTemplate:
    """Return what makes Ollama write the prompts of `tokenizer`'s chat template, and stop where serving stops.

    llama.cpp puts the first token of the sequence (BOS) before a prompt where the tokenizer does, so the Go template
    leaves that one out. Go cannot trim: Llama 3.1's template drops blanks around a message, Ollama keeps them.

    Raises:
        NoOllamaTemplate: The tokenizer has no template, or one of no known family.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise NoOllamaTemplate("Ollama needs one chat template; this model's tokenizer has none, or several.")
    prompts = _rendered(tokenizer, tokenizer.chat_template)
    bos, adds_bos = tokenizer.bos_token or "", _adds_bos(tokenizer)
    for name in families():
        jinja = chat_templates.read(name)
        own = _rendered(tokenizer, jinja)
        begins_with_bos = "bos_token" in jinja or prompts != own
        if None in own or prompts not in (own, [f"{bos}{text}" for text in own]):
            continue
        if adds_bos and not begins_with_bos:
            raise NoOllamaTemplate(f"Ollama would begin each prompt with {bos!r}, which the chat template does not.")
        go = _read_go(name).replace("BOS_TOKEN", bos).replace("EOS_TOKEN", tokenizer.eos_token or "")
        first = bos if begins_with_bos and not adds_bos else ""
        return OllamaTemplate(template=first + go, stop=_stop(tokenizer, stop_token_ids))
    raise NoOllamaTemplate(
        f"Ollama: no Go template is known that writes this model's prompts; known are {', '.join(families())}."
    )


@cache
def families() -> tuple[str, ...]:
    """Return the names of the families of templates, those that are told apart by less last."""
    names = (path.name for path in (files("cluster") / "chat_templates").iterdir())
    return tuple(sorted(name.removesuffix(".gotmpl") for name in names if name.endswith(".gotmpl")))


def _read_go(name: str) -> str:
    return (files("cluster") / "chat_templates" / f"{name}.gotmpl").read_text(encoding="utf-8")


def _rendered(tokenizer: Tokenizer, template: str) -> list[str | None]:
    return [_prompt(tokenizer, template, messages) for messages in CONVERSATIONS]


def _prompt(tokenizer: Tokenizer, template: str, messages: Messages) -> str | None:
    """Return the prompt, None where the template refuses the conversation, as some do with a system message."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError):  # TypeError: the tokenizer lacks a special token that the template adds
        return None
    return str(text)


def _adds_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id]


def _stop(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> tuple[str, ...]:
    words = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids] + [tokenizer.eos_token]
    return tuple(dict.fromkeys(word for word in words if word))
