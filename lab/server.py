"""What the lab's Pods run: one process that listens inside every Pod's namespace and answers with the Pod's
name.

TCP and SCTP: the first line that a client sends says what it wants.

    name           the Pod's name and a line's end, then the connection closes; also after 0.3 s of silence
    peer           the client's address and port as the Pod sees them, likewise
    all            name, the client's address and port, the own address and port that were asked, likewise
    echo           from then on everything comes back
    stream MS      a counted line every MS milliseconds, until the client leaves
    GET ...        the name as an HTTP response, for curl and the like

UDP: `peer` and `all` are answered like that, anything else with the name; the answer leaves from the address
that was asked.

The process is told what to serve over a Unix socket, a JSON object a line: {"serve": NAME, "netns": PATH,
"ports": [...], "sctp": [...]} and {"stop": NAME}; it answers {"ok": true} or {"error": TEXT}. A Pod that
stops closes its connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lab import netns

SILENCE = 0.3
"""Seconds after which a TCP client that says nothing gets the name."""

_BACKLOG = 4096
_LINE_LIMIT = 1 << 16
_HTTP_WORDS = (b"GET ", b"HEAD ", b"POST ")
_IPV6_PKTINFO = 50
_IPV6_RECVPKTINFO = 49
_IP_PKTINFO = 8
_PACKET_INFO_SPACE = 64
_SO_RCVBUFFORCE = 33
_DATAGRAM_BUFFER = 4 << 20  # many ask at the same time


class Pod:
    """One name, served on ports of one namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._servers: list[asyncio.Server] = []
        self._datagrams: list[socket.socket] = []
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, where: Path, ports: Sequence[int], sctp: Sequence[int]) -> None:
        """Listen on each port, TCP and UDP, and on the others SCTP, IPv4 and IPv6.

        Raises OSError when a port is taken.
        """
        streams, self._datagrams = netns.run(where, _open_sockets, ports, sctp)
        for listener in streams:
            self._servers.append(await asyncio.start_server(self._accept, sock=listener, limit=_LINE_LIMIT))
        for datagram in self._datagrams:
            asyncio.get_running_loop().add_reader(datagram, self._answer_datagrams, datagram)

    def stop(self) -> None:
        """Close everything, as when the Pod's processes end."""
        for server in self._servers:
            server.close()
        for datagram in self._datagrams:
            asyncio.get_running_loop().remove_reader(datagram)
            datagram.close()
        for task in self._clients:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            await self._converse(reader, writer)
        except (OSError, EOFError, ValueError, asyncio.CancelledError):
            pass  # the client left, or the Pod ends
        finally:
            self._clients.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), SILENCE)
        except TimeoutError:
            line = b""
        word = line.split()[0].lower() if line.split() else b"name"
        if line.startswith(_HTTP_WORDS):
            await self._answer_http(reader, writer)
        elif word == b"echo":
            await self._echo(reader, writer)
        elif word == b"stream":
            await self._stream(writer, float(line.split()[1]) / 1000)
        else:
            client, own = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
            writer.write(self._tell(word, client, own))
            await writer.drain()

    def _tell(self, word: bytes, client: tuple[Any, ...], own: tuple[Any, ...]) -> bytes:
        match word:
            case b"peer":
                return f"{client[0]} {client[1]}\n".encode()
            case b"all":
                return f"{self.name} {client[0]} {client[1]} {own[0]} {own[1]}\n".encode()
        return f"{self.name}\n".encode()

    async def _answer_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readline()).strip():
            continue
        body, client = f"{self.name}\n".encode(), writer.get_extra_info("peername")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        head += f"X-Peer: {client[0]} {client[1]}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_LINE_LIMIT):
            writer.write(data)
            await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, interval: float) -> None:
        number = 0
        while True:
            writer.write(f"{self.name} {number}\n".encode())
            await writer.drain()
            await asyncio.sleep(interval)
            number += 1

    def _answer_datagrams(self, datagram: socket.socket) -> None:
        with contextlib.suppress(OSError):  # nothing more to read, or the client is out of reach
            while True:
                data, info, _, client = datagram.recvmsg(_LINE_LIMIT, _PACKET_INFO_SPACE)
                own = (_asked(info), datagram.getsockname()[1])
                datagram.sendmsg([self._tell(data.strip(), client, own)], _reply_from(info), 0, client)


class Server:
    """The Pods that are served, and the socket over which that is told."""

    def __init__(self) -> None:
        self._pods: dict[str, Pod] = {}

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the lines of one connection to the control socket."""
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(json.loads(line))).encode() + b"\n")
                await writer.drain()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if name := request.get("stop"):
            self._stop(name)
        elif name := request.get("serve"):
            self._stop(name)
            pod = Pod(name)
            try:
                await pod.start(Path(request["netns"]), request["ports"], request.get("sctp", ()))
            except OSError as error:
                pod.stop()
                return {"error": f"{name} cannot listen: {error}"}
            self._pods[name] = pod
        return {"ok": sorted(self._pods)}

    def _stop(self, name: str) -> None:
        if pod := self._pods.pop(name, None):
            pod.stop()


def _open_sockets(
    ports: Sequence[int], sctp: Sequence[int]
) -> tuple[list[socket.socket], list[socket.socket]]:
    streams: list[socket.socket] = []
    datagrams: list[socket.socket] = []
    try:
        for port in ports:
            for family in (socket.AF_INET, socket.AF_INET6):
                streams.append(_bound(family, socket.SOCK_STREAM, port))
                streams[-1].listen(_BACKLOG)
                datagrams.append(_bound(family, socket.SOCK_DGRAM, port))
        for port in sctp:
            for family in (socket.AF_INET, socket.AF_INET6):
                streams.append(_bound(family, socket.SOCK_STREAM, port, socket.IPPROTO_SCTP))
                streams[-1].listen(_BACKLOG)
    except BaseException:
        for opened in (*streams, *datagrams):
            opened.close()
        raise
    return streams, datagrams


def _bound(
    family: socket.AddressFamily, kind: socket.SocketKind, port: int, protocol: int = 0
) -> socket.socket:
    opened = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        if kind == socket.SOCK_STREAM:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BUFFER)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        else:
            opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        opened.bind(("", port))
    except BaseException as error:
        opened.close()
        if isinstance(error, OSError):
            error.filename = f"port {port}"
        raise
    return opened


def _reply_from(info: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Return packet information that makes the answer leave from the address that was asked."""
    for level, kind, data in info:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            _, local, _ = struct.unpack("I4s4s", data)
            return [(level, kind, struct.pack("I4s4s", 0, local, bytes(4)))]
        if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
            address, link = struct.unpack("16sI", data)
            scope = link if ip_address(address).is_link_local else 0
            return [(level, kind, struct.pack("16sI", address, scope))]
    return []


def _asked(info: list[tuple[int, int, bytes]]) -> str:
    """Return the address that a datagram was sent to."""
    for level, kind, data in info:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            return str(ip_address(data[8:12]))
        if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
            return str(ip_address(data[:16]))
    return "?"


async def serve(path: Path) -> None:
    """Serve what the control socket asks for, until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    fresh = path.with_name(f"{path.name}.new")
    async with await asyncio.start_unix_server(Server().control, fresh, limit=1 << 20):
        fresh.rename(path)  # who sees it can connect
        await stopping.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
