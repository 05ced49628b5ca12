"""How a request chooses its tokens, in vLLM's words, and vLLM's log-probabilities in ours."""

import json

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from serve_apps.grammar import JSON_OPTIONS, Grammar
from serve_apps.logprobs import TokenLogprobs
from serve_apps.sampling import Sampling

GRAMMAR_BACKEND = "guidance"
"""vLLM's name for llguidance, which the transformers engine uses too: both refuse and keep the same schemas."""


def sampling_params(
    sampling: Sampling, *, max_tokens: int, stop_token_ids: list[int], is_streaming: bool
) -> SamplingParams:
    """Return vLLM's words for `sampling`; stop tokens are the request's own, and texts are decoded elsewhere."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        min_tokens=min(sampling.min_tokens, max_tokens),
        structured_outputs=_structured(sampling.grammar.grammar) if sampling.grammar else None,
        logprobs=sampling.num_logprobs,
        seed=sampling.seed,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if is_streaming else RequestOutputKind.FINAL_ONLY,
    )


def _structured(grammar: Grammar) -> StructuredOutputsParams:
    # As Lark, since vLLM reads a bare schema with options of its own.
    schema = json.loads(grammar.json_schema) | {"x-guidance": JSON_OPTIONS}
    return StructuredOutputsParams(grammar=f"start: %json {json.dumps(schema, ensure_ascii=False)}")


def token_logprobs(output: CompletionOutput, num_logprobs: int) -> tuple[TokenLogprobs, ...]:
    """Return the log-probabilities of the tokens in `output`, none if the request did not ask for them."""
    return tuple(
        TokenLogprobs(
            token_id=token_id,
            logprob=candidates[token_id].logprob,
            top=tuple(
                (other, value.logprob)
                for other, value in sorted(candidates.items(), key=lambda item: item[1].rank or 0)
                if (value.rank or 0) <= num_logprobs
            ),
        )
        for token_id, candidates in zip(output.token_ids, output.logprobs or (), strict=False)
    )
