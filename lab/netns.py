"""Named network namespaces, as `ip netns` makes them, and running a function inside one.

A thread of its own enters the namespace by setns and ends there, so that no other thread is ever moved. A
socket stays in the namespace in which it was made, and so does a program's process: both are used from
outside later.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import ParamSpec, TypeVar

from lab.names import LAB

DIRECTORY = Path("/run/netns")

P = ParamSpec("P")
T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 0x100000
_MNT_DETACH = 2
_EINVAL = 22

_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str) -> Path:
    """Return where a namespace of this name is found."""
    return DIRECTORY / name


def create(name: str) -> Path:
    """Make a namespace whose loopback is up and whose other links shall have addresses at once.

    Raises FileExistsError when the name is taken, OSError when the kernel refuses.
    """
    _prepare_directory()
    mount_point = path(name)
    mount_point.touch(mode=0o444, exist_ok=False)
    try:
        run_thread(_mount_new, mount_point)
    except BaseException:
        remove(name)
        raise
    return mount_point


def remove(name: str) -> None:
    """Remove a name; the namespace ends with its last process and socket. Gone already is fine."""
    mount_point = path(name)
    while _libc.umount2(os.fsencode(mount_point), _MNT_DETACH) == 0:
        continue
    mount_point.unlink(missing_ok=True)


def names(prefix: str) -> Iterator[str]:
    """Return the names that start so."""
    if DIRECTORY.is_dir():
        yield from sorted(entry.name for entry in DIRECTORY.iterdir() if entry.name.startswith(prefix))


def enter(where: Path) -> None:
    """Move the calling thread into a namespace, for good."""
    with where.open("rb") as file:
        _check(_libc.setns(file.fileno(), _CLONE_NEWNET), f"setns to {where}")


def run(where: Path, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function inside a namespace and return what it returns, or raise what it raises."""

    def inside() -> T:
        enter(where)
        return function(*args, **kwargs)

    return run_thread(inside)


def wait_for_threads() -> None:
    """Wait for the lab's threads that still run, though who started them was interrupted."""
    for thread in threading.enumerate():
        if thread.name.startswith(LAB) and thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # it was never started
                thread.join()


def run_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread of its own."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # handed to the caller as it is
            future.set_exception(error)

    thread = threading.Thread(target=body, name=f"{LAB}-netns", daemon=True)
    thread.start()
    try:
        return future.result()
    finally:
        thread.join()


def identity(where: Path) -> tuple[int, int]:
    """Return the device and inode that tell one namespace from another."""
    status = where.stat()
    return status.st_dev, status.st_ino


def set_sysctl(name: str, value: str) -> None:
    """Set a network setting, such as ipv4/ip_forward, of the calling thread's namespace."""
    Path("/proc/sys/net", name).write_text(value)


def _mount_new(mount_point: Path) -> None:
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")
    _mount(b"/proc/thread-self/ns/net", mount_point, _MS_BIND)
    _loopback_up()


def _loopback_up() -> None:
    from pyroute2 import IPRoute  # noqa: PLC0415 - 0.1 s that only those pay who make namespaces

    with IPRoute() as kernel:
        kernel.link("set", index=1, state="up")


def _prepare_directory() -> None:
    """Make /run/netns a shared mount as `ip netns` does, so that both see each other's namespaces."""
    DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    try:
        _mount(b"", DIRECTORY, _MS_SHARED | _MS_REC)
    except OSError as error:
        if error.errno != _EINVAL:
            raise
        _mount(os.fsencode(DIRECTORY), DIRECTORY, _MS_BIND | _MS_REC)
        _mount(b"", DIRECTORY, _MS_SHARED | _MS_REC)


def _mount(source: bytes, target: Path, flags: int) -> None:
    _check(_libc.mount(source, os.fsencode(target), b"none", flags, None), f"mount on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
