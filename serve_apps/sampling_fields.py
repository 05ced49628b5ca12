"""How a request wants its tokens chosen, from the fields of its body."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from serve_apps.grammar import CompiledGrammar, Grammar, compile_grammar
from serve_apps.refusals import Refusal, in_range, unsupported
from serve_apps.sampling import Sampling

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM: scores divided by them overflow."""
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
"""OpenAI's bounds, for chat and completions."""
MAX_BIASES = 1024
"""Tokens in `logit_bias`; OpenAI's own bound."""


def read_sampling(fields: dict[str, Any], defaults: Sampling, *, vocab_size: int) -> Sampling:
    """Return the sampling that `fields` ask for, `defaults` where they say nothing; grammars are read apart.

    Raises:
        Refusal: a value out of its range.
    """

    def given(name: str, default: float, low: float, high: float) -> Any:
        return in_range(name, default if fields[name] is None else fields[name], low, high)

    temperature = given("temperature", defaults.temperature, 0, 2)
    top_p = given("top_p", defaults.top_p, 0, 1)
    if top_p == 0:  # the smallest nucleus there is: OpenAI and vLLM differ here, greedy is what both mean
        temperature, top_p = 0.0, 1.0
    top_k = given("top_k", defaults.top_k, -1, 2**31)
    return Sampling(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=top_p,
        top_k=max(0, int(top_k)),  # -1 is vLLM's word for all
        min_p=given("min_p", defaults.min_p, 0, 1),
        repetition_penalty=given("repetition_penalty", defaults.repetition_penalty, 1e-2, 1e2),
        presence_penalty=given("presence_penalty", defaults.presence_penalty, -2, 2),
        frequency_penalty=given("frequency_penalty", defaults.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(fields["logit_bias"] or {}, vocab_size),
        min_tokens=int(given("min_tokens", defaults.min_tokens, 0, 2**31)),
        num_logprobs=_num_logprobs(fields),
        seed=fields["seed"],
    )


def read_grammar(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...]
) -> CompiledGrammar | None:
    """Return what `response_format` binds the answer to; may take a second, in which other threads go on.

    Raises:
        Refusal: a kind of format or a schema that cannot be kept, or a field that contradicts it.
    """
    wanted = fields["response_format"]
    if wanted is None or wanted.type == "text":
        return None
    schema = _schema(wanted)
    for name in ("ignore_eos", "min_tokens"):
        if fields[name]:
            raise Refusal(f"{name} contradicts response_format, which says where the answer ends.", param=name)
    return compile_grammar(Grammar.from_json_schema(schema), tokenizer, stop_token_ids)


def _schema(response_format: Any) -> dict[str, Any]:
    if response_format.type == "json_object":
        return {"type": "object"}
    if response_format.type != "json_schema":
        raise unsupported(f"response_format.type={response_format.type!r}", "use text, json_object or json_schema")
    schema: dict[str, Any] | None = response_format.json_schema and response_format.json_schema.json_schema
    if schema is None:
        raise Refusal("response_format.json_schema.schema is missing.", param="response_format")
    return schema


def _num_logprobs(fields: dict[str, Any]) -> int | None:
    if "top_logprobs" not in fields:  # a completion: one number says both
        wanted = fields["logprobs"]
        return None if wanted is None else int(in_range("logprobs", wanted, 0, MAX_COMPLETION_LOGPROBS))
    num_top = int(in_range("top_logprobs", fields["top_logprobs"] or 0, 0, MAX_TOP_LOGPROBS))
    if not fields["logprobs"]:
        if num_top:
            raise Refusal("top_logprobs needs logprobs=true beside it.", param="top_logprobs")
        return None
    return num_top


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise Refusal(f"logit_bias has {len(biases)} tokens; give up to {MAX_BIASES}.", param="logit_bias")
    for token, bias in biases.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
            raise Refusal(
                f"logit_bias has the token {token[:40]!r}; token ids are numbers below {vocab_size}.",
                param="logit_bias",
            )
        in_range("logit_bias", bias, -100, 100)
    return tuple((int(token), bias) for token, bias in biases.items())
