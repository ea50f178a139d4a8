"""A held directory has one holder; a replaced file is never seen half."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from agent.files import hold, replace


def test_a_directory_has_one_holder_until_it_lets_go(tmp_path: Path) -> None:
    first = hold(tmp_path, 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(TimeoutError, match="is in use"):
        hold(tmp_path, 0.1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before

    threading.Timer(0.2, os.close, (first,)).start()
    os.close(hold(tmp_path, 10))


def test_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "nothing", 0)


def test_a_reader_sees_the_old_content_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "lease.json"
    contents = {letter * 100_000 for letter in (b"a", b"b")}
    replace(file, b"a" * 100_000)
    done = threading.Event()

    def write() -> None:
        for _ in range(100):
            for content in sorted(contents):
                replace(file, content)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = {file.read_bytes()}
    while not done.is_set():
        seen.add(file.read_bytes())
    writer.join()

    assert seen <= contents
    assert list(tmp_path.iterdir()) == [file]
