"""The answers on a Service's healthCheckNodePort: whether this node has an endpoint of its own for it.

    load balancer --GET / --> any address of the node, healthCheckNodePort
                  <-- 200     there is one: send traffic here
                  <-- 503     there is none: externalTrafficPolicy Local would drop it

The body and the header X-Load-Balancing-Endpoint-Weight are those that kube-proxy documents. `want` is told
all that there should be, and starts and stops listeners until it is so; a port that cannot be had is a
problem of its Service, and is tried again at the next `want`. Whoever can reach the node can ask, so a
request is small, comes in time, and there are few at once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple, TypeAlias

REQUEST_LIMIT_S = 5.0
REQUEST_BYTES = 4096
CONNECTIONS = 64
"""At once, on all ports; more are closed unanswered."""

ServiceKey: TypeAlias = tuple[str, str]

log = logging.getLogger(__name__)


class Check(NamedTuple):
    """A Service's port for health checks, and how many of its endpoints are on this node."""

    port: int
    local: int


class HealthChecks:
    """Listens where `want` says, in the network namespace of the event loop's thread."""

    def __init__(self) -> None:
        self.problems: dict[ServiceKey, str] = {}
        self._wanted: dict[ServiceKey, Check] = {}
        self._listening: dict[ServiceKey, tuple[int, list[asyncio.Server]]] = {}
        self._connections = 0

    async def want(self, checks: Mapping[ServiceKey, Check]) -> None:
        """Answer for exactly these from now on; `problems` then says which have no listener, and why."""
        if self._wanted == checks and not self.problems:
            return
        self._wanted = dict(checks)
        for key in [key for key, (port, _) in self._listening.items() if self._port(key) != port]:
            await self._stop(key)
        for key in self.problems.keys() - checks.keys():
            del self.problems[key]
        for key, check in checks.items():
            if key not in self._listening:
                await self._start(key, check.port)

    async def close(self) -> None:
        """Stop listening."""
        await self.want({})

    def _port(self, key: ServiceKey) -> int | None:
        check = self._wanted.get(key)
        return check.port if check else None

    async def _start(self, key: ServiceKey, port: int) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(key, reader, writer)

        servers: list[asyncio.Server] = []
        try:
            for listening in _listen(port):
                server = await asyncio.start_server(serve, sock=listening, limit=REQUEST_BYTES)
                servers.append(server)
        except OSError as error:
            for server in servers:
                server.close()
            self.problems[key] = (
                f"spec.healthCheckNodePort {port} cannot be served on this node: {error.strerror or error}"
            )
            return
        self.problems.pop(key, None)
        self._listening[key] = port, servers
        log.info("event=health-check-started service=%s/%s port=%d", *key, port)

    async def _stop(self, key: ServiceKey) -> None:
        port, servers = self._listening.pop(key)
        for server in servers:
            server.close()
        log.info("event=health-check-stopped service=%s/%s port=%d", *key, port)

    async def _serve(
        self, key: ServiceKey, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._connections += 1
        try:
            if self._connections <= CONNECTIONS:
                async with asyncio.timeout(REQUEST_LIMIT_S):
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(key))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # no request, or nobody who takes the answer
        finally:
            self._connections -= 1
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _answer(self, key: ServiceKey) -> bytes:
        check = self._wanted.get(key)
        local = check.local if check else 0
        namespace, name = key
        body = json.dumps(
            {
                "service": {"namespace": namespace, "name": name},
                "localEndpoints": local,
                "serviceProxyHealthy": True,
            }
        ).encode()
        head = (
            f"HTTP/1.1 {'200 OK' if local else '503 Service Unavailable'}\r\n"
            "Content-Type: application/json\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            f"X-Load-Balancing-Endpoint-Weight: {local}\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + body


def _listen(port: int) -> Iterator[socket.socket]:
    """Listen on every address of each family that this kernel has. Raises OSError."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:  # ipv6.disable=1
                continue
            raise
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((address, port))
            listening.listen(CONNECTIONS)
        except OSError:
            listening.close()
            raise
        yield listening
