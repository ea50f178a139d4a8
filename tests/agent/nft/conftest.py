"""A network namespace of a test's own, entered by the test's thread and gone with it."""

import asyncio
import ctypes
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.nft.kernel import Kernel
from lab.limits import SLOWNESS

CLONE_NEWNET = 0x40000000
LIMIT_S = 20.0 * SLOWNESS


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture
def netns() -> Iterator[None]:
    """An empty network namespace around the test: no name, no trace, whatever happens to the test."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open(Path("/proc/thread-self/ns/net"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(libc.unshare(CLONE_NEWNET))
        yield
    finally:
        _checked(libc.setns(before, CLONE_NEWNET))
        os.close(before)


@pytest.fixture
def with_kernel(netns: None) -> Callable[[Callable[[Kernel], Coroutine[Any, Any, Any]]], Any]:
    """Runs a coroutine function with a started Kernel, within a limit."""

    def run(body: Callable[[Kernel], Coroutine[Any, Any, Any]], **options: Any) -> Any:
        async def limited() -> Any:
            async with Kernel(**options) as kernel, asyncio.timeout(LIMIT_S):
                return await body(kernel)

        return asyncio.run(limited())

    return run
