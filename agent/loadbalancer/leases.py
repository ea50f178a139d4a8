"""Where Leases are kept: the API server, or files that several agents of one machine share.

Both refuse a write that is not based on the Lease as it is (Conflict), which is all that `claim` builds on.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from agent.cluster.client import ApiClient
from agent.cluster.errors import Conflict, NotFound, Unreachable
from agent.cluster.model import Lease
from agent.files import replace

NAMESPACE = "kube-system"
ANSWER_S = 1.0
"""So long an answer is waited for: a Lease that is held for 3 s can be tried twice."""

_AT_ONCE = 4

T = TypeVar("T")


class Leases(Protocol):
    """Leases by name; all raise ApiError."""

    async def get(self, name: str) -> Lease | None:
        """The Lease as it is; None when there is none."""

    async def create(self, lease: Lease) -> Lease:
        """Make it. Raises Conflict when there is one."""

    async def update(self, lease: Lease) -> Lease:
        """Change it from the one that was read. Raises Conflict, NotFound."""

    async def delete(self, lease: Lease) -> None:
        """Remove the one that was read. Raises Conflict, NotFound."""

    def close(self) -> None:
        """Let go of what is held open."""


class ApiLeases:
    """Leases of the cluster, by a client and threads of their own: no slow call of others holds them up."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client.with_limits(connect_s=ANSWER_S, answer_s=ANSWER_S)
        self._threads = ThreadPoolExecutor(_AT_ONCE, "podwall-leases")

    async def get(self, name: str) -> Lease | None:
        try:
            return await self._call(lambda: self._client.get_lease(NAMESPACE, name))
        except NotFound:
            return None

    async def create(self, lease: Lease) -> Lease:
        return await self._call(lambda: self._client.create_lease(lease))

    async def update(self, lease: Lease) -> Lease:
        return await self._call(lambda: self._client.update_lease(lease))

    async def delete(self, lease: Lease) -> None:
        await self._call(lambda: self._client.delete_lease(lease))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)  # none takes longer than an answer
        self._client.close()

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class FileLeases:
    """A file per Lease in a directory; who reads or writes one locks the directory meanwhile."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def get(self, name: str) -> Lease | None:
        return await self._locked(lambda: self._read(name))

    async def create(self, lease: Lease) -> Lease:
        return await self._locked(lambda: self._write(lease, None))

    async def update(self, lease: Lease) -> Lease:
        return await self._locked(lambda: self._write(lease, lease.resource_version))

    async def delete(self, lease: Lease) -> None:
        await self._locked(lambda: self._remove(lease))

    def close(self) -> None:
        """Nothing is held open."""

    async def _locked(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(self._work, work)

    def _work(self, work: Callable[[], T]) -> T:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            held = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX)
                return work()
            finally:
                os.close(held)
        except OSError as error:
            raise Unreachable(f"Leases in {self._directory}: {error.strerror}") from error

    def _read(self, name: str) -> Lease | None:
        try:
            return msgspec.json.decode(self._file(name).read_bytes(), type=Lease)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise Unreachable(f"{self._file(name)} cannot be read: {error}; remove it") from error

    def _write(self, lease: Lease, basis: str | None) -> Lease:
        before = self._read(lease.name)
        if basis is not None and before is None:
            raise NotFound(f"Lease {lease.name}: there is none")
        if (before.resource_version if before else None) != basis:
            raise Conflict(f"Lease {lease.name} was changed meanwhile")
        # Never a version that somebody has seen, also when the Lease was removed and made again.
        written = msgspec.structs.replace(lease, resource_version=uuid.uuid4().hex)
        replace(self._file(lease.name), msgspec.json.encode(written))
        return written

    def _remove(self, lease: Lease) -> None:
        before = self._read(lease.name)
        if before is None:
            raise NotFound(f"Lease {lease.name}: there is none")
        if before.resource_version != lease.resource_version:
            raise Conflict(f"Lease {lease.name} was changed meanwhile")
        self._file(lease.name).unlink()

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"
