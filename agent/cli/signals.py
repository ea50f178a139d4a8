"""Signals that a command handles while it runs; whoever handled them before does so again afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def handled(*numbers: signal.Signals, by: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """These signals call `by` meanwhile; only the main thread may ask for it."""
    before = {number: signal.signal(number, by) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """End as Ctrl-C does: by the way that cleans up."""
    raise KeyboardInterrupt
