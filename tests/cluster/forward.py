"""A door into the engine's network: connections to a local port of the host are carried to the same port
inside.

    python -m tests.cluster.forward PORT

The listening socket is opened in the caller's network namespace; then the process moves into the engine's,
where it stays, and makes its connections there. It ends with the engine, whose clean-up ends every process in
its namespace.
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from pathlib import Path

from tests.cluster.engine import NAMESPACE

CLONE_NEWNET = 0x40000000
BLOCK = 1 << 16


def main() -> None:
    """Listen, say so with one line, and carry until the end."""
    port = int(sys.argv[1])
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    enter(NAMESPACE)
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(listener, port))


def enter(namespace: Path) -> None:
    """Move this process into a network namespace."""
    with namespace.open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.chdir("/")


async def serve(listener: socket.socket, port: int) -> None:
    """Accept connections for ever."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(carry, sock=listener)
    await server.serve_forever()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one direction and pass its end on."""
    with contextlib.suppress(ConnectionError):
        while block := await reader.read(BLOCK):
            writer.write(block)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
            return
    writer.close()


if __name__ == "__main__":
    main()
