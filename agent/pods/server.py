"""The agent's socket: one request a connection, from root alone, answered or refused in time.

    connect --> peer is root? --> request (limits: 1 MiB, 4 descriptors, 5 s) --> handler --> answer, close

The socket is a pathname with mode 0600. It is bound under another name and renamed into place, so that a
stale one is replaced without a moment in which there is none. Descriptors that came with a request are
the handler's while it runs; they are closed here afterwards, come what may.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cni import spec, wire
from cni.spec import CniError

REQUEST_LIMIT_S = 5.0
"""How long a peer may take to send its request, and to take the answer."""

CALL_LIMIT_S = 120.0
"""How long a handler may take; longer than any limit inside of one."""

CONNECTIONS = 512
_SO_PEERCRED = struct.Struct("=3i")
_READ = 1 << 16

Handler = Callable[[Mapping[str, Any], list[int]], Awaitable[object]]
Observer = Callable[[str, float, int], None]
"""Is told of each call: its name, its seconds, and the error's code (0: none)."""

log = logging.getLogger(__name__)


class ServerError(Exception):
    """The socket cannot be made; the message says what is in the way."""


class Server:
    """Answers requests on a socket by the handlers named for their calls.

    A handler raises CniError for what its caller should know; anything else is logged and answered.
    """

    def __init__(
        self, path: Path, handlers: Mapping[str, Handler], observe: Observer = lambda *_: None
    ) -> None:
        self.path = path
        self._handlers = handlers
        self._observe = observe
        self._socket: socket.socket | None = None
        self._inode = 0
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def start(self) -> None:
        """Listen. Raises ServerError."""
        self._socket = _listen(self.path)
        self._inode = self.path.stat().st_ino
        self._accepting = asyncio.create_task(self._accept(self._socket))

    async def stop(self, limit_s: float = 5.0) -> None:
        """Accept no more, let running requests end within a time limit, and take the socket away."""
        if self._accepting:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._socket:
            self._socket.close()
            if self.path.exists() and self.path.stat().st_ino == self._inode:
                self.path.unlink()
        if self._serving:
            _, late = await asyncio.wait(self._serving, timeout=limit_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # out of descriptors, most likely: those in use come back
                self._room.release()
                log.error("event=accept-failed error=%r", str(error))
                await asyncio.sleep(0.1)
                continue
            except BaseException:
                self._room.release()
                raise
            task = asyncio.create_task(self._serve(connection))
            self._serving.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()):
            log.error("event=connection-failed error=%r", str(error), exc_info=error)

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            try:
                with _Descriptors() as descriptors:
                    answer = await self._answer(connection, descriptors)
                await _send(connection, answer)
            except (OSError, TimeoutError) as error:
                log.info("event=peer-gone error=%r", str(error) or "it does not take the answer")

    async def _answer(self, connection: socket.socket, descriptors: _Descriptors) -> bytes:
        if (uid := _peer_uid(connection)) != 0:
            log.warning("event=peer-refused uid=%d", uid)
            return wire.Failure(spec.FAILED, f"only root may ask the agent, not uid {uid}").encode()
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                request = await _request(connection, descriptors)
        except TimeoutError:
            return _too_late(f"the request was not whole after {REQUEST_LIMIT_S:g} s")
        except wire.WireError as error:
            return wire.Failure(spec.DECODING_FAILURE, f"no request that can be read: {error}").encode()
        return await self._call(request, descriptors.fds) if request else b""

    async def _call(self, request: wire.Request, fds: list[int]) -> bytes:
        handler = self._handlers.get(request.call)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return wire.Failure(
                spec.FAILED, f"no such call {request.call[:80]!r}", f"known: {known}"
            ).encode()
        begun, code = time.perf_counter(), 0
        try:
            async with asyncio.timeout(CALL_LIMIT_S):
                return wire.Answer(await handler(request.body, fds)).encode()
        except CniError as error:
            code = error.code
            return wire.Failure(error.code, error.msg, error.details).encode()
        except TimeoutError:
            code = spec.TRY_AGAIN_LATER
            return _too_late(f"{request.call} did not end within {CALL_LIMIT_S:g} s")
        except Exception as error:
            log.exception("event=call-failed call=%s", request.call)
            code = spec.FAILED
            return wire.Failure(
                code, f"{request.call} failed in the agent: {error!r}", "see its log"
            ).encode()
        finally:
            self._observe(request.call, time.perf_counter() - begun, code)


class _Descriptors:
    """Descriptors that came over a connection; closed at the end of the block."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self.fds:
            os.close(fd)

    def receive(self, connection: socket.socket) -> bytes:
        """Read what has come. Raises WireError for more descriptors than a request may have."""
        space = socket.CMSG_SPACE(wire.DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, flags, _ = connection.recvmsg(_READ, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                self.fds.extend(received)
        if flags & socket.MSG_CTRUNC or len(self.fds) > wire.DESCRIPTORS:
            raise wire.WireError(f"more than {wire.DESCRIPTORS} descriptors came with it")
        return data


async def _request(connection: socket.socket, descriptors: _Descriptors) -> wire.Request | None:
    """Read the request; None when the peer closes without one. Raises WireError."""
    receiver = wire.Receiver()
    while True:
        try:
            data = descriptors.receive(connection)
        except BlockingIOError:
            await _readable(connection)
            continue
        if not data:
            if receiver.started:
                raise wire.WireError("the connection ended in the middle of it")
            return None
        payload = receiver.receive(data)
        if payload is not None:
            return wire.decode_request(payload)


async def _send(connection: socket.socket, answer: bytes) -> None:
    """Send the answer and let the peer read it; closed with something unread it would be lost."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(REQUEST_LIMIT_S):
        if answer:
            await loop.sock_sendall(connection, answer)
        connection.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(connection, _READ):
            pass


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _SO_PEERCRED.size)
    return int(_SO_PEERCRED.unpack(credentials)[1])


def _too_late(message: str) -> bytes:
    return wire.Failure(spec.TRY_AGAIN_LATER, message).encode()


def _listen(path: Path) -> socket.socket:
    """Bind and listen at a pathname, for root alone; what is stale there is replaced. Raises ServerError."""
    fresh = path.with_name(path.name + ".new")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _check_directory(path.parent)
        _check_place(path)
        fresh.unlink(missing_ok=True)
        listening.bind(str(fresh))
        fresh.chmod(0o600)
        listening.listen(socket.SOMAXCONN)  # nobody could connect before, whatever the mode was
        fresh.rename(path)
    except OSError as error:
        listening.close()
        raise ServerError(f"socket {path} cannot be made: {error.strerror or error}") from error
    except BaseException:
        listening.close()
        raise
    return listening


def _check_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = directory.stat()
    if facts.st_uid != 0 or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ServerError(
            f"directory {directory} must be root's and writable by nobody else: chown, chmod 700"
        )


def _check_place(path: Path) -> None:
    """What is there must be a socket that nobody serves any more."""
    if not path.is_symlink() and not path.exists():
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ServerError(f"{path} is there and is no socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
    raise ServerError(f"another agent serves {path}: end it first")
