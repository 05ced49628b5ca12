"""From OpenAI's request bodies to prompt tokens and sampling; what cannot be done is refused by name."""

from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from serve_apps.conversations import read_conversation
from serve_apps.fields import refuse_unsupported
from serve_apps.grammar import Grammar, compile_grammar
from serve_apps.message_stream import PLAIN, Reading
from serve_apps.prompts import check_tokens, read_prompts
from serve_apps.refusals import Refusal, in_range, unsupported
from serve_apps.sampling import Sampling
from serve_apps.sampling_fields import read_grammar, read_sampling
from serve_apps.tools import ToolUse, calls_schema

MAX_STOPS = 16
MAX_STOP_TOKENS = 128
"""Of a request, besides the model's own: fewer than any vocabulary has, so that a token is left to go on with."""
SUPPORTED = frozenset({"messages", "prompt", "model", "stream", "stream_options"}) | {
    *("max_tokens", "max_completion_tokens", "n", "stop", "stop_token_ids", "ignore_eos"),
    *("temperature", "top_p", "top_k", "min_p", "min_tokens", "seed", "logprobs", "top_logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning_effort"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What the served model brings to every request."""

    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    defaults: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer that is wanted."""

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A whole request: its answers in the order of their index."""

    answers: tuple[Answer, ...]
    num_prompt_tokens: int
    """Each prompt counted once, whatever `n`."""
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    is_stream: bool
    is_usage_streamed: bool
    reading: Reading = PLAIN
    """How the text of an answer becomes a message."""


def default_sampling(config: GenerationConfig) -> Sampling:
    """Return what a model's `generation_config.json` recommends where a request says nothing, as vLLM does."""
    return Sampling(
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        top_k=int(config.top_k or 0),
        repetition_penalty=float(config.repetition_penalty or 1.0),
    )


def read_chat(request: BaseModel, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits) -> Job:
    """Return the job of a `/v1/chat/completions` body.

    Raises:
        Refusal: a field that is not supported, out of range, or a conversation that does not fit.
    """
    refuse_unsupported(request, SUPPORTED)
    conversation = read_conversation(request, tokenizer)
    fields = vars(request)
    wanted = "max_tokens" if fields["max_completion_tokens"] is None else "max_completion_tokens"
    job = _job(request, [conversation.prompt_ids], tokenizer, limits, max_tokens_field=wanted, default_max_tokens=None)
    if conversation.tools is not None:
        job = _with_tools(job, fields, conversation.tools, tokenizer, limits)
    # A grammar binds the answer from its first token, so it leaves no room for thinking.
    is_bound = any(answer.sampling.grammar is not None for answer in job.answers)
    return replace(job, reading=replace(conversation.reading, thinking="never") if is_bound else conversation.reading)


def _with_tools(
    job: Job, fields: dict[str, Any], tools: ToolUse, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits
) -> Job:
    """Return `job` bound to calls where the request forces them."""
    for name in ("ignore_eos", "min_tokens", "response_format") if tools.is_forced else ("response_format",):
        if fields[name] and getattr(fields[name], "type", None) != "text":
            raise Refusal(f"{name} contradicts tools, which say what an answer may be.", param=name)
    if not tools.is_forced:
        return job
    grammar = Grammar.from_json_schema(calls_schema(tools), param="tools")
    compiled = compile_grammar(grammar, tokenizer, limits.stop_token_ids)
    answers = (replace(answer, sampling=replace(answer.sampling, grammar=compiled)) for answer in job.answers)
    return replace(job, answers=tuple(answers))


def read_completion(request: BaseModel, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits) -> Job:
    """Return the job of a `/v1/completions` body; `prompt` is a text, token ids, or a list of either.

    Raises:
        Refusal: as for `read_chat`.
    """
    refuse_unsupported(request, SUPPORTED)
    prompts = read_prompts("prompt", vars(request)["prompt"], tokenizer, limits.vocab_size)
    return _job(request, prompts, tokenizer, limits, max_tokens_field="max_tokens", default_max_tokens=16)


def _job(
    request: BaseModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    limits: ModelLimits,
    *,
    max_tokens_field: str,
    default_max_tokens: int | None,
) -> Job:
    fields = vars(request)
    n = in_range("n", 1 if fields["n"] is None else fields["n"], 1, limits.max_num_seqs)
    if n * len(prompts) > limits.max_num_seqs:
        raise Refusal(f"{len(prompts)} prompts x n={n} are more than {limits.max_num_seqs} answers.", param="n")
    wanted = fields[max_tokens_field]
    wanted = default_max_tokens if wanted is None else in_range(max_tokens_field, wanted, 1, 2**31)
    sampling = read_sampling(fields, limits.defaults, vocab_size=limits.vocab_size)
    if (grammar := read_grammar(fields, tokenizer, limits.stop_token_ids)) is not None:
        sampling = replace(sampling, grammar=grammar)
    own_stop_token_ids = () if fields["ignore_eos"] else limits.stop_token_ids
    options = fields["stream_options"]
    if options is not None and vars(options)["continuous_usage_stats"]:
        raise unsupported("stream_options.continuous_usage_stats", "use include_usage")
    return Job(
        answers=tuple(
            Answer(prompt_ids=ids, max_tokens=_max_tokens(ids, wanted, limits), sampling=_nth(sampling, i))
            for ids in prompts
            for i in range(n)
        ),
        num_prompt_tokens=sum(map(len, prompts)),
        stop=_stops(fields["stop"]),
        stop_token_ids=frozenset((*own_stop_token_ids, *_stop_token_ids(fields["stop_token_ids"], limits.vocab_size))),
        is_stream=bool(fields["stream"]),
        is_usage_streamed=options is not None and bool(options.include_usage),
    )


def _nth(sampling: Sampling, index: int) -> Sampling:
    """Return the sampling of answer `index`: the answers to one seed differ, and are the same again next time."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % 2**63)


def _max_tokens(prompt_ids: list[int], wanted: int | None, limits: ModelLimits) -> int:
    room = limits.max_model_len - len(prompt_ids)
    if room < (wanted or 1):
        raise Refusal(
            f"This model's maximum context length is {limits.max_model_len} tokens; the prompt has {len(prompt_ids)}"
            f"{f' and {wanted} are asked for' if wanted else ''}. Shorten the prompt or the answer.",
            param="max_tokens" if wanted else None,
            code="context_length_exceeded",
        )
    return room if wanted is None else wanted


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or not all(stops):
        raise Refusal(f"stop has {len(stops)} texts; give up to {MAX_STOPS}, none of them empty.", param="stop")
    return stops


def _stop_token_ids(token_ids: list[int] | None, vocab_size: int) -> list[int]:
    token_ids = token_ids or []
    if len(token_ids) > MAX_STOP_TOKENS:
        message = f"stop_token_ids has {len(token_ids)} tokens; give up to {MAX_STOP_TOKENS}."
        raise Refusal(message, param="stop_token_ids")
    check_tokens("stop_token_ids", token_ids, vocab_size)
    return token_ids
