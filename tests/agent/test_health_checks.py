"""Health checks of Services: what a load balancer is told, on real sockets of a namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from agent.health_checks import CONNECTIONS, Check, HealthChecks
from tests.linux import command, own_netns

T = TypeVar("T")
WEB, API = ("default", "web"), ("default", "api")
ADDRESSES = ("127.0.0.1", "::1")


def in_own_namespace(story: Callable[[], Awaitable[T]]) -> T:
    """Run it where the network is only a loopback."""
    with own_netns():
        command("ip", "link", "set", "lo", "up")
        return asyncio.run(asyncio.wait_for(story(), 20))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def checks() -> AsyncIterator[HealthChecks]:
    made = HealthChecks()
    try:
        yield made
    finally:
        await made.close()


async def ask(address: str, port: int) -> tuple[int, dict[str, str], object]:
    """Status, headers and body."""

    def get() -> tuple[int, dict[str, str], object]:
        connection = http.client.HTTPConnection(address, port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), json.loads(answer.read())

    return await asyncio.to_thread(get)


async def listens(port: int, address: str = "127.0.0.1") -> bool:
    try:
        _, writer = await asyncio.open_connection(address, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.mark.parametrize("local", [0, 3])
def test_what_is_answered(local: int) -> None:
    async def story() -> None:
        async with checks() as made:
            await made.want({WEB: Check(31000, local)})
            for address in ADDRESSES:
                status, headers, body = await ask(address, 31000)
                assert status == (200 if local else 503)
                assert headers["Content-Type"] == "application/json"
                assert headers["X-Load-Balancing-Endpoint-Weight"] == str(local)
                assert body == {
                    "service": {"namespace": "default", "name": "web"},
                    "localEndpoints": local,
                    "serviceProxyHealthy": True,
                }

    in_own_namespace(story)


def test_listeners_follow_what_is_wanted() -> None:
    async def story() -> None:
        async with checks() as made:
            await made.want({WEB: Check(31000, 1), API: Check(31001, 1)})
            await made.want({WEB: Check(31002, 0)})
            assert not await listens(31000)
            assert not await listens(31001)
            assert (await ask("::1", 31002))[0] == 503
            await made.want({WEB: Check(31002, 1)})
            assert (await ask("::1", 31002))[0] == 200
        assert not await listens(31002)

    in_own_namespace(story)


def test_two_services_change_ports() -> None:
    async def story() -> None:
        async with checks() as made:
            await made.want({WEB: Check(31000, 1), API: Check(31001, 0)})
            await made.want({WEB: Check(31001, 1), API: Check(31000, 0)})
            assert not made.problems
            assert (await ask("127.0.0.1", 31001))[0] == 200
            assert (await ask("127.0.0.1", 31000))[0] == 503

    in_own_namespace(story)


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_in_use_is_that_services_problem_until_it_is_free(family: int, address: str) -> None:
    async def story() -> None:
        async with checks() as made:
            with socket.create_server((address, 31000), family=family):
                await made.want({WEB: Check(31000, 1), API: Check(31001, 1)})
                said = "spec.healthCheckNodePort 31000 cannot be served on this node: Address already in use"
                assert made.problems == {WEB: said}
                assert (await ask("127.0.0.1", 31001))[0] == 200
            await made.want({WEB: Check(31000, 1), API: Check(31001, 1)})
            assert not made.problems
            assert (await ask("127.0.0.1", 31000))[0] == 200

    in_own_namespace(story)


def test_who_says_nothing_or_too_much_is_not_answered() -> None:
    async def story() -> None:
        async with checks() as made:
            await made.want({WEB: Check(31000, 1)})
            reader, writer = await asyncio.open_connection("127.0.0.1", 31000)
            writer.write(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            silent = [await asyncio.open_connection("127.0.0.1", 31000) for _ in range(CONNECTIONS)]
            reader, more = await asyncio.open_connection("127.0.0.1", 31000)
            assert await reader.read() == b""
            for each in (more, *(writer for _, writer in silent)):
                each.close()
            await asyncio.sleep(0)

            async def again() -> int:
                while True:
                    with contextlib.suppress(http.client.BadStatusLine, ConnectionError):
                        return (await ask("127.0.0.1", 31000))[0]

            assert await again() == 200

    in_own_namespace(story)
