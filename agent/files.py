"""Files that others look at in the same moment: a directory that one process uses, a file replaced whole."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

LOOK_EVERY_S = 0.1


def hold(directory: Path, limit_s: float) -> int:
    """Be the only one who holds a directory, until the descriptor is closed or the process ends.

    Whoever holds it meanwhile has `limit_s` seconds to let go. Raises TimeoutError after that, OSError.
    """
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    end = time.monotonic() + limit_s
    try:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return held
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"{directory} is in use") from None
            time.sleep(LOOK_EVERY_S)
    except BaseException:
        os.close(held)
        raise


def replace(file: Path, content: bytes) -> None:
    """Write a file that others read meanwhile: they see the old content or the new. Raises OSError.

    One writer at a time; a reader must not take names that end in `.new`.
    """
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_bytes(content)
    fresh.replace(file)
