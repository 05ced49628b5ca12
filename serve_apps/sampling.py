"""Per-request sampling inside one continuous batch.

R = rows: the requests of a pass that get a new token; V = vocabulary, T = tokens of the pass.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from serve_apps.grammar import CompiledGrammar, GrammarState
from serve_apps.logprobs import TokenLogprobs
from serve_apps.scores import draw, penalize, penalize_counts

ROUTE = "route"
"""The keyword of `add_request` under which a request's `Route` travels through transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one request chooses its tokens."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative scores of tokens that were seen, in the prompt too."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the scores of these tokens."""
    min_tokens: int = 0
    """Tokens before a stop token may come."""
    grammar: CompiledGrammar | None = None
    num_logprobs: int | None = None
    """How many of the likeliest tokens are told beside the chosen one; None tells nothing at all."""
    seed: int | None = None


GREEDY = Sampling(temperature=0)


@dataclass(eq=False)
class Route:
    """What a pass has to know about a request: which adapter it goes through and how it samples."""

    slot: int
    """Slot of the adapter bank, -1 for the bare base."""
    sampling: Sampling
    stop_token_ids: tuple[int, ...] = ()
    generator: torch.Generator = field(default_factory=torch.Generator)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for every chosen token, if the request asks for them."""

    def __post_init__(self) -> None:
        sampling = self.sampling
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        # Nothing but a temperature of 0 matters: the argmax over the batch is the choice, and there is nothing to do.
        self.is_argmax = replace(sampling, seed=None, top_p=1.0, top_k=0, min_p=0.0) == GREEDY
        self._grammar: GrammarState | None = sampling.grammar.start() if sampling.grammar else None
        self._bias_ids = torch.tensor([token_id for token_id, _ in sampling.logit_bias], dtype=torch.long)
        self._bias = torch.tensor([bias for _, bias in sampling.logit_bias], dtype=torch.float32)
        self._has_count_penalty = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._counts: Counter[int] = Counter()
        self._num_chosen = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Route":
        """Return the same object: transformers copies a request it pushes back, and the draws must go on."""
        return self

    @property
    def error(self) -> str | None:
        """Return why the answer ended before its grammar did."""
        error = self._grammar.error if self._grammar else None
        return error and f"the grammar became too complex to follow: {error}"

    def choose(self, scores: torch.Tensor, state: RequestState) -> int:
        """Return the next token by the model's `scores` [V], which are changed, and note it."""
        sampling = self.sampling
        logprobs = None if sampling.num_logprobs is None else scores.log_softmax(-1)
        self._shape(scores, state)
        if sampling.temperature > 0:
            token_id = draw(
                scores,
                self.generator,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
            )
        else:
            token_id = int(scores.argmax())
        self._note(token_id, logprobs)
        return token_id

    def _shape(self, scores: torch.Tensor, state: RequestState) -> None:
        """Change the scores in vLLM's order: minimum length, bias, penalties; last what nothing may undo."""
        sampling = self.sampling
        if self._num_chosen < sampling.min_tokens:
            scores[list(self.stop_token_ids)] = -math.inf
        if sampling.logit_bias:
            scores[self._bias_ids] += self._bias.to(scores.device)
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*state.initial_tokens, *state.generated_tokens}))
            penalize(scores, seen, sampling.repetition_penalty)
        if self._has_count_penalty:
            penalize_counts(
                scores, self._counts, presence=sampling.presence_penalty, frequency=sampling.frequency_penalty
            )
        if self._grammar is not None:
            self._grammar.mask(scores)

    def _note(self, token_id: int, logprobs: torch.Tensor | None) -> None:
        self._num_chosen += 1
        if self._has_count_penalty:
            self._counts[token_id] += 1
        if self._grammar is not None:
            self._grammar.accept(token_id)
        if logprobs is not None:
            top, token_ids = logprobs.topk(self.sampling.num_logprobs or 0)
            self.logprobs.append(
                TokenLogprobs(
                    token_id=token_id,
                    logprob=float(logprobs[token_id]),
                    top=tuple(zip(token_ids.tolist(), top.tolist(), strict=True)),
                )
            )


class BatchSampler:
    """Stands where transformers keeps its list of logits processors, and knows the composition of each pass.

    transformers samples for the whole batch in one way, does not know temperature 0, and sorts the vocabulary for
    every row as soon as one asks for top_k. So its own choice stays the argmax, and a row that samples has its token
    drawn first and made the largest. Each request has its own generator, so its draws do not depend on its neighbours.
    """

    # What transformers reads of its own `ContinuousBatchingLogitsProcessorList`.
    tensors_required = 0
    do_processing = True

    def __init__(self) -> None:
        self._rows: list[RequestState] = []
        self.slot_of_token = torch.empty(0, dtype=torch.long)  # [T]

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Note who is in the pass that is being prepared; transformers runs it right after."""
        self._rows = [request.state for request in requests_in_batch if request.has_new_token]
        slots = torch.tensor([_route(request.state).slot for request in requests_in_batch])
        lengths = torch.tensor([request.query_length for request in requests_in_batch])
        self.slot_of_token = slots.repeat_interleave(lengths)
        return arg_storage

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Raise unless the request carries a route and nothing else."""
        if set(kwargs) != {ROUTE}:
            raise ValueError(f"a request carries {ROUTE}, not {sorted(kwargs)}")

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Do nothing: no arguments travel in tensors."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return scores [R, V] whose argmax is each row's choice."""
        for row, state in enumerate(self._rows):
            route = _route(state)
            if not route.is_argmax:
                token_id = route.choose(scores[row], state)
                scores[row, token_id] = math.inf
        return scores


def _route(state: RequestState) -> Route:
    route = state.logit_processor_kwargs[ROUTE]
    assert isinstance(route, Route)
    return route
