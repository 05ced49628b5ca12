"""Per-request sampling inside one continuous batch.

R = rows: the requests of a pass that get a new token; V = vocabulary, T = tokens of the pass.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

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
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative scores of tokens that were seen (arXiv:1909.05858)."""
    seed: int | None = None


@dataclass(eq=False)
class Route:
    """What a pass has to know about a request: which adapter it goes through and how it samples."""

    slot: int
    """Slot of the adapter bank, -1 for the bare base."""
    sampling: Sampling
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Route":
        """Return the same object: transformers copies a request it pushes back, and the draws must go on."""
        return self


class BatchSampler:
    """Stands where transformers keeps its list of logits processors, and knows the composition of each pass.

    transformers samples for the whole batch in one way, does not know temperature 0, and sorts the vocabulary for
    every row as soon as one asks for top_k. So its own choice stays the argmax, and a row that samples gets Gumbel
    noise on its filtered scores first: the argmax of log p + Gumbel is a draw from p (Gumbel-max trick,
    arXiv:1411.0030). Each request has its own generator, so its draws do not depend on its neighbours.
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
            if route.sampling.repetition_penalty != 1.0:
                seen = torch.tensor(sorted({*state.initial_tokens, *state.generated_tokens}))
                penalize(scores[row], seen, route.sampling.repetition_penalty)
            if route.sampling.temperature > 0:
                token = draw(scores[row], route.sampling, route.generator)
                scores[row, token] = math.inf
        return scores


def _route(state: RequestState) -> Route:
    route = state.logit_processor_kwargs[ROUTE]
    assert isinstance(route, Route)
    return route


def penalize(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> None:
    """Make the tokens `seen` less likely in `scores` [V], in place."""
    chosen = scores[seen]
    scores[seen] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)


def draw(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token drawn from softmax(`scores` [V] / temperature), cut to top_k, then to top_p.

    top_p keeps the most likely tokens up to the one that reaches it (arXiv:1904.09751).
    """
    scores = scores.to("cpu", torch.float32) / sampling.temperature
    candidates: torch.Tensor | None = None
    if 0 < sampling.top_k < len(scores):
        scores, candidates = scores.topk(sampling.top_k)
    if sampling.top_p < 1.0:
        scores, candidates = nucleus(scores, candidates, sampling.top_p)
    noise = torch.empty_like(scores).exponential_(generator=generator).log_().neg_()  # Gumbel(0, 1)
    best = int((scores + noise).argmax())
    return best if candidates is None else int(candidates[best])


def nucleus(scores: torch.Tensor, candidates: torch.Tensor | None, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores and tokens of the smallest set that holds `top_p` of the probability.

    A sort of a whole vocabulary costs milliseconds, and the nucleus is nearly always small: the likeliest tokens are
    taken first, and more only when they do not reach `top_p`.
    """
    probabilities = scores.softmax(-1)
    num = min(256, len(scores))
    while True:
        top, places = probabilities.topk(num)  # sorted, descending
        before = top.cumsum(-1) - top
        if num == len(scores) or float(before[-1] + top[-1]) >= top_p:
            places = places[before < top_p]
            return scores[places], places if candidates is None else candidates[places]
        num = min(num * 8, len(scores))
