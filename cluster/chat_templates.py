"""Chat templates for the models whose tokenizer brings none."""

from importlib.resources import files


def read(name: str) -> str:
    """Return the Jinja source of `chat_templates/<name>.jinja`, rendered by `apply_chat_template`."""
    return (files("cluster") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
