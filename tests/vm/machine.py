"""One run of the machine: qemu without acceleration, what it prints passed on, and an end in any case.

    qemu --ttyS0--> console.log   (shown when the machine dies)
         --ttyS1--> standard output, as it comes
         --ttyS2--> status

The machine's clock counts its instructions, one a nanosecond, and leaps over what would be waited for. So
however busy this host is, the machine finds itself equally fast and limits of waiting hold; seconds that are
told inside are not those of the wall. It has one processor, since two have no common count.

qemu dies with this process, however that ends. All that it writes goes into one directory, which is emptied
before and after; a lock on it keeps a second machine waiting.
"""

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import cache
from tests.cluster.console import ENDS_WITH_US, ClusterError

MEMORY = 2048  # MiB
CONSOLE_LINES = 40
KERNEL_ARGUMENTS = (
    "root=/dev/vda rw init=/sbin/podwall-init console=ttyS0 loglevel=5 panic=-1"
    " tsc=reliable"  # or the kernel would compare clocks, find them apart and take a slow one
)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Give an empty directory for one run, and empty it afterwards."""
    place = cache.root() / "vm-run"
    cache.root().mkdir(parents=True, exist_ok=True)
    with cache.locked(cache.root() / ".lock-vm-run"):
        cache.remove(place)
        place.mkdir()
        try:
            yield place
        finally:
            cache.remove(place)


def run(machine: Path, sources: Path, place: Path, limit: float) -> int:
    """Boot the machine and return the tests' exit status.

    `limit` is in seconds. Raises ClusterError when the machine is not through by then, or dies.
    """
    process = subprocess.Popen(
        [*ENDS_WITH_US, "nice", "-n", "10", *_command(machine, sources, place)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(place)},  # where qemu keeps what is written to the disk
        process_group=0,
    )
    assert process.stdout is not None
    try:
        if not _pass_on(process.stdout.fileno(), time.monotonic() + limit):
            raise ClusterError(f"not through after {limit / 60:.0f} minutes; LIMIT=MINUTES allows more")
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    status = (place / "status").read_text().strip()
    if not status:
        lines = (place / "console.log").read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        raise ClusterError("\n".join(["the machine ended without a result; its kernel said last:", *lines]))
    return int(status)


def _command(machine: Path, sources: Path, place: Path) -> list[str]:
    """Return qemu's words: no devices but two disks and three serial ports."""
    words = ["qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none"]
    words += ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", "max"]
    words += ["-m", str(MEMORY), "-kernel", f"{machine}/vmlinuz", "-initrd", f"{machine}/initrd.img"]
    words += ["-append", KERNEL_ARGUMENTS]
    words += ["-drive", f"file={machine}/disk.img,if=virtio,format=raw,snapshot=on"]
    words += ["-drive", f"file={sources},if=virtio,format=raw,readonly=on"]
    words += ["-serial", f"file:{place}/console.log"]
    words += ["-chardev", "stdio,id=tests,signal=off", "-serial", "chardev:tests"]
    return [*words, "-serial", f"file:{place}/status"]


def _pass_on(source: int, deadline: float) -> bool:
    """Copy bytes to standard output until there are no more; say whether that came before the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                if not (data := os.read(source, 1 << 16)):
                    return True
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
    return False
