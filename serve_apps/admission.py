"""What the gate let a request in with: whose key it is, and what the key may still use."""

from dataclasses import dataclass
from typing import Any

from cluster.keys import KeyRecord
from serve_apps.quotas import Quota
from serve_apps.refusals import Refusal

BYTES_PER_TOKEN = 4
"""Of a body: about what English takes, and Japanese (3 bytes a character) too. Only a guess until the engine counts."""
UNEXPLAINED = frozenset({499, 500})
"""A client that left, and a request that ended without an answer, which is what that looks like from inside."""
DEFAULT_COMPLETION_TOKENS = 16
"""Of `/v1/completions` without `max_tokens` (OpenAI's API reference)."""


@dataclass(slots=True)
class Admission:
    """One request that was let in."""

    key: KeyRecord | None
    """None where the server has no keys and the request comes from its own machine, which may do everything."""
    quota: Quota
    num_body_bytes: int = 0
    num_reserved: int = 0
    """Tokens taken from the quota for the most that the answer may use."""

    @property
    def is_admin(self) -> bool:
        """Whether the request may change what is served."""
        return self.key is None or self.key.is_admin

    def may_know(self, base: str, name: str = "") -> bool:
        """Return whether the request may learn that this model or adapter is there."""
        return self.key is None or self.key.scopes.may_know(base, name)

    def may_use(self, base: str) -> bool:
        """Return whether the request may use the bare base model."""
        return self.key is None or self.key.scopes.allow_model(base)

    def without_names(self, refusal: Refusal, model: str) -> Refusal:
        """Return `refusal` of an adapter that is not there, naming others only where the key may use them all."""
        base = model.partition(":")[0]
        if refusal.status != 404 or self.key is None or {"*:*", f"{base}:*"} & set(self.key.scopes.adapters):
            return refusal
        return Refusal(f"There is no {model!r}.", param=refusal.param, code=refusal.code, status=404)

    def check(self, base: str, name: str = "", version: int = 0) -> None:
        """Raise `Refusal` (403) unless the request may use the base model, or this version of its adapter."""
        if self.key is None:
            return
        scopes = self.key.scopes
        is_allowed = scopes.allow_adapter(base, name, version) if name else scopes.allow_model(base)
        if not is_allowed:
            raise not_allowed(f"{base}:{name}" if name else base)

    def reserve(self, fields: dict[str, Any], call_method: str, max_model_len: int) -> None:
        """Take the most tokens that the answer to a body may use from the key's quota; raises `Refusal` (429)."""
        if self.quota.tokens is not None:
            most = self.num_body_bytes // BYTES_PER_TOKEN + most_answer_tokens(fields, call_method, max_model_len)
            self.num_reserved = self.quota.reserve(most if call_method in _COUNTED else 0)

    def settle(self, *, num_tokens: int, status: int) -> None:
        """Charge what was used, once the request is over.

        `num_tokens` is what the engine counted, 0 where it never said so. Then a request that was refused costs
        nothing, and any other what it reserved: the engine says what it used at the end of a stream, so whoever
        leaves before has no less charged than whoever stays.
        """
        is_refused = status >= 400 and status not in UNEXPLAINED
        used = num_tokens or (0 if is_refused else self.num_reserved)
        self.quota.settle(reserved=self.num_reserved, used=used)


_COUNTED = frozenset({"chat", "completions", "embeddings"})


def most_answer_tokens(fields: dict[str, Any], call_method: str, max_model_len: int) -> int:
    """Return an upper bound of the tokens that all answers to a request body may have."""
    if call_method not in ("chat", "completions"):
        return 0
    default = max_model_len if call_method == "chat" else DEFAULT_COMPLETION_TOKENS
    asked = fields.get("max_completion_tokens") or fields.get("max_tokens") or default
    prompt = fields.get("prompt")
    is_many = isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt)
    num_answers = max(1, fields.get("n") or 1) * (len(prompt) if is_many and prompt else 1)
    return num_answers * min(max(0, asked), max_model_len)


def not_allowed(what: str) -> Refusal:
    """Return the refusal of something that a key does not allow, the same whether it is there or not."""
    return Refusal(f"This API key may not use {what!r}.", param="model", code="insufficient_permissions", status=403)
