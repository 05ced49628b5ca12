"""From OpenAI's request bodies to prompt tokens and sampling; what cannot be done is refused by name."""

from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from pydantic import BaseModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from serve_apps.refusals import Refusal, unsupported
from serve_apps.sampling import Sampling

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM: scores divided by them overflow."""
MAX_STOPS = 16
SUPPORTED = frozenset({"messages", "prompt", "model", "stream", "stream_options"}) | {
    *("max_tokens", "max_completion_tokens", "n", "stop", "stop_token_ids", "ignore_eos"),
    *("temperature", "top_p", "top_k", "repetition_penalty", "seed"),
}
HARMLESS = frozenset({"user", "request_id", "session_id"})
"""Fields that name somebody or something and change no answer."""


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
    refuse_unsupported(request)
    messages = [_plain_message(i, message) for i, message in enumerate(vars(request)["messages"])]
    if not messages:
        raise Refusal("messages is empty; give at least one message.", param="messages")
    if tokenizer.chat_template is None:
        raise Refusal("This model has no chat template; use /v1/completions.", param="messages")
    try:
        prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise Refusal(f"The model's chat template refuses these messages: {error}.", param="messages") from error
    fields = vars(request)
    wanted = "max_tokens" if fields["max_completion_tokens"] is None else "max_completion_tokens"
    return _job(request, [list(prompt_ids)], limits, max_tokens_field=wanted, default_max_tokens=None)


def read_completion(request: BaseModel, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits) -> Job:
    """Return the job of a `/v1/completions` body; `prompt` is a text, token ids, or a list of either.

    Raises:
        Refusal: as for `read_chat`.
    """
    refuse_unsupported(request)
    prompt = vars(request)["prompt"]
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(x, int) for x in prompt))
    prompts = [prompt] if is_one else prompt
    if not prompts or not all(prompts):
        raise Refusal("prompt is empty; give a text or token ids.", param="prompt")
    all_ids = [tokenizer(one).input_ids if isinstance(one, str) else list(one) for one in prompts]
    for ids in all_ids:
        if beyond := [i for i in ids if i >= limits.vocab_size]:
            raise Refusal(f"prompt has token {beyond[0]}; the vocabulary has {limits.vocab_size}.", param="prompt")
    return _job(request, all_ids, limits, max_tokens_field="max_tokens", default_max_tokens=16)


def refuse_unsupported(request: BaseModel) -> None:
    """Raise `Refusal` for the first field that was given, is not supported and would change the answer."""
    for name in sorted(request.model_extra or {}):
        if request.model_extra and request.model_extra[name] is not None:
            raise Refusal(f"Unknown field {name!r}; leave it out.", param=name, code="unknown_parameter")
    for name, field in type(request).model_fields.items():
        if name not in request.model_fields_set or name in SUPPORTED | HARMLESS:
            continue
        value = vars(request)[name]
        default = field.get_default(call_default_factory=True)
        is_empty = value is None or value == default or value in ([], {}, "")
        if not is_empty and not _is_plain_text(name, value):
            raise unsupported(name, "leave it out")


def _is_plain_text(name: str, value: Any) -> bool:
    return name == "response_format" and getattr(value, "type", None) == "text"


def _plain_message(index: int, message: dict[str, Any]) -> dict[str, str]:
    where = f"messages[{index}]"
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, [], ""):
            raise unsupported(f"{where}.{key}", "send role and content")
    role, content = message["role"], message.get("content")
    if role not in ("system", "user", "assistant"):
        raise unsupported(f"{where}.role={role!r}", "use system, user or assistant")
    if content is None or isinstance(content, str):
        return {"role": role, "content": content or ""}
    parts = [dict(part) if not isinstance(part, str) else {"type": "text", "text": part} for part in content]
    for place, part in enumerate(parts):
        if part.get("type") != "text":
            raise unsupported(f"{where}.content[{place}].type={part.get('type')!r}", "send text")
    return {"role": role, "content": "".join(part["text"] for part in parts)}


def _job(
    request: BaseModel,
    prompts: list[list[int]],
    limits: ModelLimits,
    *,
    max_tokens_field: str,
    default_max_tokens: int | None,
) -> Job:
    fields = vars(request)
    n = _in_range("n", 1 if fields["n"] is None else fields["n"], 1, limits.max_num_seqs)
    if n * len(prompts) > limits.max_num_seqs:
        raise Refusal(f"{len(prompts)} prompts x n={n} are more than {limits.max_num_seqs} answers.", param="n")
    wanted = fields[max_tokens_field]
    wanted = default_max_tokens if wanted is None else _in_range(max_tokens_field, wanted, 1, 2**31)
    sampling = _sampling(fields, limits.defaults)
    stop_token_ids = () if fields["ignore_eos"] else limits.stop_token_ids
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
        stop_token_ids=frozenset((*stop_token_ids, *(fields["stop_token_ids"] or ()))),
        is_stream=bool(fields["stream"]),
        is_usage_streamed=options is not None and bool(options.include_usage),
    )


def _sampling(fields: dict[str, Any], defaults: Sampling) -> Sampling:
    def given(name: str, default: float) -> float:
        return default if fields[name] is None else fields[name]

    temperature = _in_range("temperature", given("temperature", defaults.temperature), 0, 2)
    top_p = _in_range("top_p", given("top_p", defaults.top_p), 0, 1)
    if top_p == 0:  # the smallest nucleus there is: OpenAI and vLLM differ here, greedy is what both mean
        temperature, top_p = 0.0, 1.0
    top_k = given("top_k", defaults.top_k)
    return Sampling(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=top_p,
        top_k=0 if top_k == -1 else int(_in_range("top_k", top_k, 0, 2**31)),
        repetition_penalty=_in_range(
            "repetition_penalty", given("repetition_penalty", defaults.repetition_penalty), 1e-2, 1e2
        ),
        seed=fields["seed"],
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


def _in_range(name: str, value: float, low: float, high: float) -> Any:
    if not low <= value <= high:  # also false for NaN
        raise Refusal(f"{name} is {value}; it has to be between {low:g} and {high:g}.", param=name)
    return value
