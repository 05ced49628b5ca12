"""The messages of a conversation, from OpenAI's shape to the one that chat templates know."""

import json
from typing import Any

from serve_apps.refusals import Refusal, unsupported

ROLES = ("system", "developer", "user", "assistant", "tool")
KNOWN_KEYS = {"assistant": {"tool_calls", "reasoning", "reasoning_content"}, "tool": {"tool_call_id", "name"}}
"""Besides `role` and `content`."""


def plain_messages(messages: list[dict[str, Any]], *, takes_tools: bool) -> list[dict[str, Any]]:
    """Return the messages for `apply_chat_template`: text only, `developer` as `system`, arguments as objects.

    `takes_tools` is whether the template knows calls of tools and their results.

    Raises:
        Refusal: a message that the model cannot read; `param` names it.
    """
    if not messages:
        raise Refusal("messages is empty; give at least one message.", param="messages")
    call_ids: set[str] = set()
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check_keys(message, where, takes_tools=takes_tools)
        one: dict[str, Any] = {"role": _role(message), "content": _text(message.get("content"), f"{where}.content")}
        if message.get("tool_calls"):
            one["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(message["tool_calls"])]
            call_ids.update(call["id"] for call in one["tool_calls"])
        if message["role"] == "tool":
            one |= _answered(message, call_ids, where)
        if reasoning := message.get("reasoning") or message.get("reasoning_content"):
            one["reasoning_content"] = reasoning  # where templates that show it look
        plain.append(one)
    return plain


def _role(message: dict[str, Any]) -> str:
    role: str = message["role"]
    return "system" if role == "developer" else role


def _check_keys(message: dict[str, Any], where: str, *, takes_tools: bool) -> None:
    role = message["role"]
    if role not in ROLES:
        raise unsupported(f"{where}.role={role!r}", f"use one of {', '.join(ROLES)}")
    for key, value in message.items():
        if key in ("role", "content") or value in (None, [], ""):
            continue
        if key not in KNOWN_KEYS.get(role, set()):
            raise unsupported(f"{where}.{key}", "send role and content")
        if key in ("tool_calls", "tool_call_id") and not takes_tools:
            raise unsupported(f"{where}.{key}", "this model's chat template knows no tools; send text")


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [dict(part) if not isinstance(part, str) else {"type": "text", "text": part} for part in content]
    for place, part in enumerate(parts):
        if part.get("type") not in ("text", "refusal"):
            raise unsupported(f"{where}[{place}].type={part.get('type')!r}", "send text")
    return "".join(part.get("text") or part.get("refusal") or "" for part in parts)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments") or "{}"
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        raise Refusal(f"{where}.function.arguments is not JSON: {error}.", param=where) from error
    if not function.get("name") or not call.get("id") or not isinstance(arguments, dict):
        raise Refusal(f"{where} needs an id, and a function with a name and an object of arguments.", param=where)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _answered(message: dict[str, Any], call_ids: set[str], where: str) -> dict[str, Any]:
    call_id = message.get("tool_call_id")
    if call_id not in call_ids:
        raise Refusal(f"{where}.tool_call_id={call_id!r} answers no call before it.", param=f"{where}.tool_call_id")
    return {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
