"""Text from tokens as they come: whole characters only, up to the first stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character that is not whole yet."""


class TextStream:
    """Decodes one answer piece by piece; what it has given out is never taken back.

    A stop string ends it only behind the text of the first `min_tokens` tokens, as in vLLM.
    Held back are bytes that are not a whole character yet, and text that may turn out to begin a stop string.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), *, min_tokens: int = 0
    ) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        # Decoded together, tokens before and after a cut share a space or a character. So a window of earlier tokens
        # stays in front of the new ones: [begin, read) is known text, from `read` on it is new.
        self._begin = 0
        self._read = 0
        self._held = ""
        self.num_chars = 0
        """Characters of the answer so far, with those that are held back."""
        self.stopped_by: str | None = None
        """The stop string that ended the answer."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the answer, those of a stop string included and those after it not."""
        return len(self._token_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain after `token_ids`; tokens after a stop string are dropped."""
        if not self._stop:
            self._token_ids.extend(token_ids)
            return self._new_text(is_last=False)
        text = ""
        for token_id in token_ids:
            if self.stopped_by is None:
                self._token_ids.append(token_id)
                text += self._up_to_stop(self._new_text(is_last=False))
        return text

    def finish(self) -> str:
        """Return what was held back, now that no token follows."""
        if self.stopped_by is not None:
            return ""
        text = self._up_to_stop(self._new_text(is_last=True))
        held, self._held = self._held, ""
        return text + (held if self.stopped_by is None else "")

    def _new_text(self, *, is_last: bool) -> str:
        known = self._decode(self._token_ids[self._begin : self._read])
        text = self._decode(self._token_ids[self._begin :])
        if text.endswith(REPLACEMENT) and not is_last:
            return ""
        self._begin, self._read = self._read, len(self._token_ids)
        self.num_chars += len(text) - len(known)
        return text[len(known) :]

    def _up_to_stop(self, text: str) -> str:
        if not self._stop or len(self._token_ids) <= self._min_tokens:
            return text
        text = self._held + text
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, self.stopped_by = min(found)
            self._held = ""
            return text[:place]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
