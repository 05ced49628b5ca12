"""From a conversation to a prompt, through the model's chat template."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _get_template_variables

from serve_apps.message_stream import Reading
from serve_apps.messages import plain_messages
from serve_apps.reasoning import Thinking, thinking_of
from serve_apps.refusals import Refusal, unsupported
from serve_apps.tools import ToolUse, call_format_of, read_tools, with_description

OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of templates that other fields of the request set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A conversation as the model reads it."""

    prompt_ids: list[int]
    thinking: Thinking
    """What the model may begin its answer with, as long as no grammar binds it."""
    tools: ToolUse | None
    template: str

    @property
    def reading(self) -> Reading:
        """Return how the answer is taken apart."""
        if self.tools is None:
            return Reading(thinking=self.thinking)
        forced = self.tools.is_forced
        return Reading(
            thinking="never" if forced else self.thinking,
            call_format="json_list" if forced else call_format_of(self.template),
            names=self.tools.names,
            max_calls=self.tools.max_calls,
        )


def read_conversation(request: BaseModel, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """Return the prompt of a chat request, which ends where the answer begins.

    Raises:
        Refusal: messages or tools that the model's template cannot carry.
    """
    tools = read_tools(request)
    if tokenizer.chat_template is None:
        raise Refusal("This model has no chat template; use /v1/completions.", param="messages")
    template = tokenizer.get_chat_template(tools=_declared(tools))
    variables = _get_template_variables(template)
    takes_tools = "tools" in variables
    messages = plain_messages(vars(request)["messages"], takes_tools=takes_tools)
    if tools is not None and not tools.is_forced and not (takes_tools and call_format_of(template)):
        raise unsupported("tools", 'its chat template knows none; force a call with tool_choice="required" or a name')
    if tools is not None and not takes_tools:
        messages = with_description(messages, tools)
    settings = _settings(request, variables) | {"add_generation_prompt": vars(request)["add_generation_prompt"]}
    prompt = _render(tokenizer, messages, _declared(tools) if takes_tools else None, settings)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return Conversation(
        prompt_ids=list(prompt_ids), thinking=thinking_of(template, prompt), tools=tools, template=template
    )


def _declared(tools: ToolUse | None) -> list[dict[str, Any]] | None:
    return None if tools is None else [{"type": "function", "function": function} for function in tools.functions]


def _settings(request: BaseModel, known: frozenset[str]) -> dict[str, Any]:
    """Return what the request sets in the template, such as `enable_thinking`; a name it does not read is refused."""
    given = {f"chat_template_kwargs.{k}": v for k, v in (vars(request).get("chat_template_kwargs") or {}).items()}
    if vars(request).get("reasoning_effort") is not None:
        given["reasoning_effort"] = vars(request)["reasoning_effort"]
    settable = known - OURS
    for param in given:
        if param.rpartition(".")[2] not in settable:
            raise unsupported(param, "this model's chat template does not read it")
    return {param.rpartition(".")[2]: value for param, value in given.items()}


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    settings: dict[str, Any],
) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings))
    except (TemplateError, TypeError) as error:  # TypeError: a variable of another type than the template expects
        raise Refusal(f"The model's chat template refuses these messages: {error}.", param="messages") from error
