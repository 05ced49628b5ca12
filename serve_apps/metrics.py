"""What Prometheus is told of requests, seen from the ingress, the same way for every engine.

Ray collects the numbers of all processes of a node and exports them at one port, with `ray_` before each name.
"""

from functools import cache

from ray.util.metrics import Counter, Histogram

from serve_apps.call import Call

ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/embeddings": "embeddings"}
"""What is counted; pages, probes and lists are not."""
MAX_ADAPTER_LABELS = 100
"""Versions of adapters with time series of their own; each takes some 50. Those that come later share `other`."""
FIRST_TOKEN_S = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
PER_TOKEN_S = [0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1]
"""Somebody who reads follows some 10 tokens a second (0.1)."""
REQUEST_S = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
LABELS = ("model", "adapter", "version", "endpoint")


class AdapterLabels:
    """Keeps the number of time series bounded, however many adapters there are."""

    def __init__(self, max_labels: int = MAX_ADAPTER_LABELS) -> None:
        self._max_labels = max_labels
        self._seen: set[tuple[str, str]] = set()

    def of(self, adapter: str | None, version: int | None) -> dict[str, str]:
        """Return the labels of an adapter's version; both are empty for a base model."""
        label = (adapter or "", "" if version is None else str(version))
        if adapter and label not in self._seen:
            if len(self._seen) >= self._max_labels:
                return {"adapter": "other", "version": ""}
            self._seen.add(label)
        return {"adapter": label[0], "version": label[1]}


class RequestMetrics:
    """The instruments; one of each per process."""

    def __init__(self) -> None:
        self._labels = AdapterLabels()
        self._requests = Counter("kajiya_requests_total", "Requests that are over, by status.", (*LABELS, "status"))
        self._prompt_tokens = Counter("kajiya_prompt_tokens_total", "Tokens of prompts.", LABELS)
        self._completion_tokens = Counter("kajiya_completion_tokens_total", "Tokens of answers.", LABELS)
        self._first_token = Histogram(
            "kajiya_time_to_first_token_seconds", "From a stream's arrival to its first text.", FIRST_TOKEN_S, LABELS
        )
        self._per_token = Histogram(
            "kajiya_time_per_output_token_seconds", "Between the tokens of a stream.", PER_TOKEN_S, LABELS
        )
        self._seconds = Histogram("kajiya_request_seconds", "From arrival to the last byte.", REQUEST_S, LABELS)

    def observe(self, call: Call) -> None:
        """Count a request that is over."""
        endpoint = ENDPOINTS.get(call.path)
        if endpoint is None:
            return
        tags = {"model": call.model or "", "endpoint": endpoint} | self._labels.of(call.adapter, call.version)
        self._requests.inc(1, tags | {"status": str(call.status)})
        if call.num_prompt_tokens:
            self._prompt_tokens.inc(call.num_prompt_tokens, tags)
        if call.num_completion_tokens:
            self._completion_tokens.inc(call.num_completion_tokens, tags)
        if call.status < 400:
            self._seconds.observe(call.seconds, tags)
            self._observe_stream(call, tags)

    def _observe_stream(self, call: Call, tags: dict[str, str]) -> None:
        # An answer that comes whole has its first and its last token at the same time.
        if not call.is_stream or call.first_token_s is None:
            return
        self._first_token.observe(call.first_token_s, tags)
        if call.num_completion_tokens > 1:
            self._per_token.observe((call.seconds - call.first_token_s) / (call.num_completion_tokens - 1), tags)


def count(call: Call) -> None:
    """Observe a request that is over: an observer for `CallMiddleware`."""
    _metrics().observe(call)


@cache
def _metrics() -> RequestMetrics:
    # At the first request, so that they belong to the process that answers and not to the one that built the app.
    return RequestMetrics()
