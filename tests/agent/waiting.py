"""Awaiting what nobody could set an event for: the state of the kernel, of a file, of another thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from lab.limits import SLOWNESS


async def eventually(
    condition: Callable[[], object], limit_s: float = 10.0 * SLOWNESS, what: str = "it holds"
) -> None:
    """Return when a condition holds. Raises AssertionError when it does not in time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.005)
