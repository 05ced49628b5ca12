"""Embeddings from a decoder model: the mean of the last hidden states over a text's tokens.

The hidden states are those after the model's last norm, which its head would read. The mean is not scaled to length 1.

T = tokens of a pass, D = hidden_size.
"""

import base64
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serve_apps import responses
from serve_apps.engine import Engine
from serve_apps.fields import refuse_unsupported
from serve_apps.prompts import read_prompts
from serve_apps.refusals import Refusal
from serve_apps.requests import ModelLimits

MAX_INPUTS = 2048
"""OpenAI's own bound."""
SUPPORTED = frozenset({"input", "model", "encoding_format", "add_special_tokens"})


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingJob:
    """A whole request."""

    inputs: tuple[list[int], ...]
    encoding_format: Literal["float", "base64"]

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all inputs."""
        return sum(map(len, self.inputs))


class Embedder:
    """Computes embeddings on the model of a running engine, between the passes of its batch."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def passes(self, inputs: tuple[list[int], ...]) -> Iterator[tuple[list[int], ...]]:
        """Yield the inputs in groups for one pass each, in order; an input is never cut."""
        group: list[list[int]] = []
        for ids in inputs:
            if group and sum(map(len, group)) + len(ids) > self._engine.limits.max_batch_tokens:
                yield tuple(group)
                group = []
            group.append(ids)
        yield tuple(group)

    def embed(self, group: tuple[list[int], ...], slot: int) -> torch.Tensor:
        """Return the embeddings [len(group), D] in float32, through the adapter in `slot`; blocks until computed."""
        model = self._engine.model
        lengths = [len(ids) for ids in group]
        ids = torch.tensor([list(chain.from_iterable(group))], device=model.device)  # [1, T], one text behind the other
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
        with self._engine.paused(), _plain_attention(model), self._adapter(slot, sum(lengths)), torch.inference_mode():
            # Positions that start again tell transformers where a text begins, so that none sees another.
            output = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
            states: torch.Tensor = output.last_hidden_state[0]  # [T, D]
        return torch.stack([part.float().mean(0) for part in torch.split(states, lengths)]).cpu()

    def _adapter(self, slot: int, num_tokens: int) -> AbstractContextManager[None]:
        bank = self._engine.bank
        return nullcontext() if slot < 0 or bank is None else bank.tokens(torch.full((num_tokens,), slot))


def read_embeddings(request: BaseModel, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits) -> EmbeddingJob:
    """Return the job of a `/v1/embeddings` body; `input` is a text, token ids, or a list of either.

    Raises:
        Refusal: a field that is not supported, or an input that is empty, too long or one too many.
    """
    refuse_unsupported(request, SUPPORTED)
    fields = vars(request)
    inputs = read_prompts(
        "input", fields["input"], tokenizer, limits.vocab_size, add_special_tokens=fields["add_special_tokens"]
    )
    if len(inputs) > MAX_INPUTS:
        raise Refusal(f"input has {len(inputs)} texts; give up to {MAX_INPUTS}.", param="input")
    if (longest := max(map(len, inputs))) > limits.max_model_len:
        raise Refusal(
            f"This model's maximum context length is {limits.max_model_len} tokens; input has {longest}.",
            param="input",
            code="context_length_exceeded",
        )
    if fields["encoding_format"] not in ("float", "base64"):
        raise Refusal("encoding_format is float or base64.", param="encoding_format")
    return EmbeddingJob(inputs=tuple(inputs), encoding_format=fields["encoding_format"])


def body(job: EmbeddingJob, embeddings: torch.Tensor, model: str) -> dict[str, Any]:
    """Return the response to `job`, whose embeddings are the rows of `embeddings`."""
    write = _base64 if job.encoding_format == "base64" else torch.Tensor.tolist
    data = [{"object": "embedding", "index": i, "embedding": write(row)} for i, row in enumerate(embeddings)]
    return {"object": "list", "model": model, "data": data, "usage": responses.usage(job.num_tokens, 0)}


def _base64(row: torch.Tensor) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model run without the batch's cache, which its own attention reads and writes."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
