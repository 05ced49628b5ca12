"""What a request says of tools: how the model is told of them, and how its calls are read or forced.

Of the catalog, Qwen2.5 and Llama 3.1 have a chat template that takes tools. The others can be made to call one with
`tool_choice` "required" or a function's name: the system message describes the functions and a grammar forces the call.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from serve_apps.refusals import Refusal, unsupported
from serve_apps.tool_calls import CallFormat

NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
"""OpenAI's rule for names of functions, and a dot."""
DESCRIPTION = """You can call these functions, one JSON object each:
{functions}
Answer with a JSON list of the calls to make and nothing else, each {{"name": ..., "arguments": {{...}}}}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The tools of one request that may be called."""

    functions: tuple[dict[str, Any], ...]
    """`name`, `description` and `parameters` (a JSON schema) of each."""
    is_forced: bool
    """Whether the answer has to be calls; otherwise the model decides."""
    max_calls: int | None

    @property
    def names(self) -> frozenset[str]:
        """Return the names that a call may have."""
        return frozenset(function["name"] for function in self.functions)


def read_tools(request: BaseModel) -> ToolUse | None:
    """Return the tools that the answer may call, or None.

    Raises:
        Refusal: a tool without a usable name, or a choice that is none of the tools.
    """
    fields = vars(request)
    choice = fields.get("tool_choice")  # absent in a request that only counts tokens
    if not fields["tools"] or choice == "none":
        return None
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(fields["tools"])]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise Refusal("tools has two functions of the same name.", param="tools")
    named = getattr(choice, "function", None)
    is_forced = named is not None or choice == "required"
    if named is not None:
        functions = [function for function in functions if function["name"] == named.name]
        if not functions:
            raise Refusal(f"tool_choice names {named.name!r}, which is no tool.", param="tool_choice")
    is_single = named is not None or fields.get("parallel_tool_calls") is False
    for index, tool in enumerate(fields["tools"]):
        if tool.function.strict and not is_forced:
            raise unsupported(
                f"tools[{index}].function.strict", 'leave it out, or force the call with tool_choice="required"'
            )
    return ToolUse(functions=tuple(functions), is_forced=is_forced, max_calls=1 if is_single else None)


def call_format_of(template: str) -> CallFormat | None:
    """Return how a model with this chat template writes calls; None where the template says nothing we know."""
    if "<tool_call>" in template:
        return "hermes"
    return "llama3_json" if '"parameters":' in template and "ipython" in template else None


def calls_schema(use: ToolUse) -> dict[str, Any]:
    """Return the JSON schema of a list of calls, as `json_list` reads them.

    Raises:
        Refusal: two tools define different types under one name.
    """
    definitions: dict[str, Any] = {}
    items = []
    for function in use.functions:
        parameters = dict(function["parameters"])
        for key in ("$defs", "definitions"):  # references start at the root, so that is where definitions belong
            for name, definition in parameters.pop(key, {}).items():
                if definitions.setdefault(key, {}).setdefault(name, definition) != definition:
                    raise Refusal(f"tools define {name!r} in two ways; give one another name.", param="tools")
        call = {"name": {"const": function["name"]}, "arguments": parameters}
        items.append(
            {"type": "object", "properties": call, "required": ["name", "arguments"], "additionalProperties": False}
        )
    bounds = {"minItems": 1} | ({"maxItems": use.max_calls} if use.max_calls else {})
    return {"type": "array", "items": items[0] if len(items) == 1 else {"anyOf": items}} | bounds | definitions


def with_description(messages: list[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    """Return the conversation with the functions described in its system message."""
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in use.functions)
    text = DESCRIPTION.format(functions=lines)
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _function(tool: Any, where: str) -> dict[str, Any]:
    function = tool.function
    if not NAME.fullmatch(function.name):
        raise Refusal(f"{where}.function.name={function.name!r} does not match {NAME.pattern}.", param=where)
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"name": function.name, "description": function.description or "", "parameters": parameters}
