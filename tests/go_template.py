"""The part of Go's `text/template` that templates for Ollama use, after its documentation: an independent renderer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


@dataclass
class Node:
    """A text (`kind` "text"), a value ("value"), or "if" and "range" with their bodies."""

    kind: str
    words: list[str] = field(default_factory=list)
    text: str = ""
    branches: list[tuple[list[str] | None, list["Node"]]] = field(default_factory=list)


def render(source: str, data: dict[str, Any]) -> str:
    """Return what Go writes; raises `ValueError` for what is not known here."""
    nodes, rest = _parse(list(_pieces(source)), 0, ends=())
    assert rest == len(list(_pieces(source)))
    return "".join(_write(nodes, data, {"$": data}))


def _pieces(source: str) -> Iterator[tuple[str, str]]:
    """Yield ("text", …) and ("action", …); `{{-` and `-}}` have trimmed the text beside them."""
    place, trims_next = 0, False
    for found in ACTION.finditer(source):
        text = source[place : found.start()]
        text = text.lstrip() if trims_next else text
        yield "text", text.rstrip() if found[1] else text
        if not found[2].startswith("/*"):
            yield "action", found[2].strip()
        place, trims_next = found.end(), bool(found[3])
    yield "text", source[place:].lstrip() if trims_next else source[place:]


def _parse(pieces: list[tuple[str, str]], at: int, ends: tuple[str, ...]) -> tuple[list[Node], int]:
    nodes: list[Node] = []
    while at < len(pieces):
        kind, content = pieces[at]
        words = WORD.findall(content)
        if kind == "text":
            nodes.append(Node("text", text=content))
        elif words[0] in ends:
            return nodes, at
        elif words[0] in ("if", "range"):
            node = Node(words[0])
            condition: list[str] | None = words[1:]
            while True:
                body, at = _parse(pieces, at + 1, ends=("else", "end"))
                node.branches.append((condition, body))
                word = WORD.findall(pieces[at][1])
                if word == ["end"]:
                    break
                condition = word[2:] if word[1:2] == ["if"] else None
            nodes.append(node)
        else:
            nodes.append(Node("value", words))
        at += 1
    return nodes, at


def _write(nodes: list[Node], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if node.kind == "text":
            yield node.text
        elif node.kind == "value" and len(node.words) > 1 and node.words[1] in (":=", "="):
            variables[node.words[0]] = _value(node.words[2:], dot, variables)
        elif node.kind == "value":
            yield str(_value(node.words, dot, variables))
        elif node.kind == "range":
            ((words, body),) = node.branches
            for item in _value(words or [], dot, variables):
                yield from _write(body, item, variables)
        else:
            taken = (body for words, body in node.branches if words is None or _value(words, dot, variables))
            yield from _write(next(taken, []), dot, variables)


def _value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    function, *arguments = words
    if function in ("eq", "ne", "not"):
        values = [_value([word], dot, variables) for word in arguments]
        return not values[0] if function == "not" else (values[0] == values[1]) == (function == "eq")
    if arguments:
        raise ValueError(f"unknown function {function}")
    if function in ("true", "false"):
        return function == "true"
    if function.startswith('"'):
        return function[1:-1]
    name, _, path = function.partition(".")
    value = variables[name] if name else dot
    return value[path] if path else value
