"""The answers to one request, from tokens in the engine to pieces of text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self

from serve_apps.engine import EngineStopped, Progress
from serve_apps.logprobs import LogprobStream, PlacedLogprobs
from serve_apps.requests import Job
from serve_apps.responses import Piece
from serve_apps.runtime import Runtime
from serve_apps.stops import TextStream
from serve_apps.vocabulary import vocabulary_of


class Answering:
    """Runs the answers of `job` inside a `with`; leaving it takes those that are not finished out of the batch."""

    def __init__(self, runtime: Runtime, job: Job, slot: int, *, request_id: str) -> None:
        self._runtime = runtime
        self._job = job
        self._slot = slot
        self._request_ids = [f"{request_id}-{i}" for i in range(len(job.answers))]
        self._texts = [
            TextStream(runtime.decode, job.stop, min_tokens=answer.sampling.min_tokens) for answer in job.answers
        ]
        self._logprobs = {
            index: LogprobStream(vocabulary_of(runtime.tokenizer))
            for index, answer in enumerate(job.answers)
            if answer.sampling.num_logprobs is not None
        }
        self._running: set[int] = set()
        self._arrived: list[tuple[int, Progress]] = []
        self._has_arrived = asyncio.Event()

    def __enter__(self) -> Self:
        for index, answer in enumerate(self._job.answers):
            self._running.add(index)
            self._runtime.engine.submit(
                self._request_ids[index],
                answer.prompt_ids,
                max_tokens=answer.max_tokens,
                stop_token_ids=list(self._job.stop_token_ids),
                sampling=answer.sampling,
                slot=self._slot,
                on_progress=self._listener(index),
                # Without stop strings nobody looks at the tokens of an answer that is sent whole.
                is_streaming=self._job.is_stream or bool(self._job.stop),
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for index in self._running:
            self._runtime.engine.cancel(self._request_ids[index])

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all answers so far."""
        return sum(text.num_tokens for text in self._texts)

    async def whole(self) -> list[Piece]:
        """Return every answer in full, in order."""
        arrived = [piece async for pieces in self.pieces(lambda: 0.0) for piece in pieces]
        return sorted(_joined(arrived), key=lambda piece: piece.index)

    async def pieces(self, interval_s: Callable[[], float]) -> AsyncIterator[list[Piece]]:
        """Yield new text as it comes, all that gathers within `interval_s()` at once; the end is not kept waiting.

        Raises:
            EngineStopped: the engine failed before the end.
        """
        is_first = True
        while self._running:
            await self._has_arrived.wait()
            if not is_first and not self._is_ending():
                await self._gather(interval_s())
            arrived, self._arrived = self._arrived, []
            self._has_arrived.clear()
            pieces = [piece for index, progress in arrived if (piece := self._piece(index, progress)) is not None]
            if pieces:
                is_first = False
                yield _joined(pieces)

    async def _gather(self, interval_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + interval_s
        while (left := until - loop.time()) > 0 and not self._is_ending():
            self._has_arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._has_arrived.wait()

    def _is_ending(self) -> bool:
        return any(progress.is_finished for _, progress in self._arrived)

    def _listener(self, index: int) -> Callable[[Progress], None]:
        def arrive(progress: Progress) -> None:
            self._arrived.append((index, progress))
            self._has_arrived.set()

        return arrive

    def _piece(self, index: int, progress: Progress) -> Piece | None:
        if index not in self._running:  # a stop string ended it while this was on its way
            return None
        if progress.error is not None:
            raise EngineStopped(f"The engine failed: {progress.error}. Try again.")
        text = self._texts[index]
        new = self._push(index, progress)
        if text.stopped_by is None and not progress.is_finished:
            return Piece(index=index, text=new, logprobs=self._released(index, new)) if new else None
        self._running.discard(index)
        if not progress.is_finished:
            self._runtime.engine.cancel(self._request_ids[index])
        new += text.finish()
        is_stopped = text.stopped_by is not None or not self._job.stop_token_ids.isdisjoint(progress.token_ids[-1:])
        reason: Literal["stop", "length"] = "stop" if is_stopped else "length"
        logprobs = self._released(index, new, is_last=True)
        return Piece(index=index, text=new, finish_reason=reason, stop_reason=text.stopped_by, logprobs=logprobs)

    def _push(self, index: int, progress: Progress) -> str:
        text = self._texts[index]
        if index not in self._logprobs:
            return text.push(progress.token_ids)
        new = ""
        for token_id, logprobs in zip(progress.token_ids, progress.logprobs, strict=True):
            if text.stopped_by is None:
                self._logprobs[index].add(logprobs, text_offset=text.num_chars)
                new += text.push([token_id])
        return new

    def _released(self, index: int, new: str, *, is_last: bool = False) -> tuple[PlacedLogprobs, ...]:
        return self._logprobs[index].release(new, is_last=is_last) if index in self._logprobs else ()


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Return one piece per answer, the texts of those that came together joined."""
    joined: dict[int, list[Piece]] = {}
    for piece in pieces:
        joined.setdefault(piece.index, []).append(piece)
    return [
        replace(
            parts[-1],
            text="".join(part.text for part in parts),
            logprobs=tuple(one for part in parts for one in part.logprobs),
        )
        for parts in joined.values()
    ]
