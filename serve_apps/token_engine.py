"""What the server asks of an engine, whichever it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cluster.registry import AdapterVersion
from serve_apps.engine import Progress
from serve_apps.sampling import Sampling


class TokenEngine(Protocol):
    """Tokens in, tokens out; all methods are called from one event loop."""

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        slot: int,
        on_progress: Callable[[Progress], None],
        is_streaming: bool = True,
    ) -> None:
        """Add a request through the adapter in `slot`, -1 for none; `on_progress` is called on the event loop."""

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch; its `on_progress` is not called any more."""

    def check_health(self) -> None:
        """Raise `EngineStopped` when no request can be answered any more."""

    def num_active_requests(self) -> int:
        """Return how many requests are in the batch or wait for it."""
        ...


class AdapterLoader(Protocol):
    """Puts adapters where the engine's requests find them."""

    def load(self, slot: int, version: AdapterVersion, folder: Path) -> None:
        """Replace what is in `slot`, which no request uses, by the files in `folder`; called in a thread.

        Raises:
            UserError: the adapter is not one that this engine can hold.
        """
