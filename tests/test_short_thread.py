"""Threads that compute leave no helpers behind, and hand on what their work returned or raised."""

import asyncio
import time
from contextvars import ContextVar

import psutil
import pytest
import torch

from serve_apps import short_thread

NAME: ContextVar[str] = ContextVar("NAME", default="")


def multiply_in_parallel() -> int:
    torch.set_num_threads(3)
    torch.randn(600, 600) @ torch.randn(600, 600)
    torch.randn(2_000_000).exp()
    return psutil.Process().num_threads()


def test_helpers_of_a_computation_end_with_it() -> None:
    before = psutil.Process().num_threads()
    during = short_thread.run(multiply_in_parallel)
    assert during >= before + 3
    deadline_s = time.monotonic() + 10
    while psutil.Process().num_threads() > during - 3:  # the thread and its two helpers; they end a moment later
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_errors_and_results_come_back_and_context_goes_along() -> None:
    def fail() -> None:
        raise LookupError("nothing there")

    async def main() -> str:
        NAME.set("shop")
        with pytest.raises(LookupError, match="nothing there"):
            await short_thread.run_async(fail)
        return await short_thread.run_async(NAME.get)

    assert asyncio.run(main()) == "shop"
    with pytest.raises(LookupError, match="nothing there"):
        short_thread.run(fail)


def test_work_goes_on_to_its_end_when_its_caller_leaves() -> None:
    done: list[int] = []

    async def main() -> None:
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(gate.set)
            torch.randn(600, 600) @ torch.randn(600, 600)
            done.append(1)

        task = asyncio.create_task(short_thread.run_async(work))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    for _ in range(100):
        if done:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert done == [1]
