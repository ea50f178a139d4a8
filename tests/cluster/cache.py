"""Where built things stay: one entry per name, version and content, complete or absent.

An entry is built under a temporary name and renamed when whole, so that a build killed at any moment leaves
nothing that could be taken for a result. One lock per entry lets several builders run at once.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cluster.console import run, say

KEPT = 2  # versions of one thing: this one and the one before, for going back and forth


def root() -> Path:
    """Return the cache directory: PODWALL_CACHE, XDG_CACHE_HOME or ~/.cache, and podwall below it."""
    base = os.environ.get("PODWALL_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).resolve() / "podwall" / "cluster"


def digest(*parts: object) -> str:
    """Return a short name for the content of the parts; files are read, other things are taken as they
    print."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        whole.update(len(content).to_bytes(8, "big") + content)
    return whole.hexdigest()[:12]


def entry(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the finished entry, building it first where it is missing.

    `build` gets a path that does not exist and makes a file or a directory there.
    """
    place = root() / f"{name}-{key}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.parent / f".lock-{name}"):
        if not place.exists():
            temporary = place.parent / f".new-{name}"
            remove(temporary)
            begun = time.monotonic()
            say(f"{name}: building")
            build(temporary)
            temporary.rename(place)
            say(f"{name}: built in {time.monotonic() - begun:.1f} s")
        os.utime(place)
        older = sorted(place.parent.glob(f"{name}-{'?' * len(key)}"), key=lambda each: each.stat().st_mtime)
        for each in older[:-KEPT]:
            remove(each)
    return place


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel releases it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that holds {path.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(path: Path) -> None:
    """Remove a file or tree, releasing first what is still mounted below it."""
    for mount in reversed(mounts_below(path)):
        run(["umount", "--lazy", mount])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mounts_below(path: Path) -> list[str]:
    """List the mount points at and below a path, outermost first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].replace("\\040", " ") for line in lines]
    return sorted(point for point in points if point == str(path) or point.startswith(f"{path}/"))
