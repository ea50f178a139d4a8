"""A client with a clock: asks agnhost's servers over new connections, one per question, and says what came.

    ask.py < questions          a JSON list; the answers come as a JSON list in the same order
    ask.py RATE < questions     asks them in turn, RATE times a second, until SIGTERM; each answer is a line

It needs the standard library only and runs in the network namespace of a Pod, a node or the outside machine
(places.py).
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

AT_ONCE = 32
ERRORS = {
    ConnectionRefusedError: "refused",
    ConnectionResetError: "reset",
    TimeoutError: "timeout",
    PermissionError: "forbidden",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask whom; `source` is the address to ask from, `host` the name in HTTP's header, times in s."""

    address: str
    port: int
    path: str = "/hostname"
    protocol: str = "tcp"
    source: str | None = None
    host: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    limit: float = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of an answer, or the error: refused, reset, timeout, unreachable ...; when asked, and how long
    it took."""

    body: str
    error: str
    at: float
    seconds: float


async def ask(question: Question) -> Answer:
    """Ask one question over a connection of its own."""
    at, begun = time.time(), time.monotonic()
    body, error = "", ""
    try:
        async with asyncio.timeout(question.limit):
            body = await (ask_udp if question.protocol == "udp" else ask_http)(question)
    except OSError as problem:
        error = ERRORS.get(type(problem)) or problem.strerror or type(problem).__name__
    return Answer(body, error.lower(), at, time.monotonic() - begun)


async def ask_http(question: Question) -> str:
    """Get a path over HTTP."""
    source = (question.source, 0) if question.source else None
    reader, writer = await asyncio.open_connection(question.address, question.port, local_addr=source)
    try:
        host = question.host or "podwall"
        more = "".join(f"{name}: {value}\r\n" for name, value in question.headers)
        writer.write(
            f"GET {question.path} HTTP/1.1\r\nHost: {host}\r\n{more}Connection: close\r\n\r\n".encode()
        )
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise OSError(0, f"status {b''.join(status).decode() or 'none'}")
    return (dechunked(body) if b"chunked" in head.lower() else body).decode()


def dechunked(body: bytes) -> bytes:
    """Join the chunks of HTTP's chunked encoding."""
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        whole, body = whole + rest[:length], rest[length + 2 :] if length else b""
    return whole


async def ask_udp(question: Question) -> str:
    """Send the path's name as agnhost's UDP server knows it, and wait for the answer."""
    family = socket.AF_INET6 if ":" in question.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        if question.source:
            sock.bind((question.source, 0))
        sock.connect((question.address, question.port))
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, question.path.strip("/").encode())
        return (await loop.sock_recv(sock, 2048)).decode()


async def all_at_once(questions: list[Question]) -> list[Answer]:
    """Ask all questions, some at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(question: Question) -> Answer:
        async with gate:
            return await ask(question)

    return await asyncio.gather(*map(one, questions))


async def steadily(questions: list[Question], rate: float) -> None:
    """Ask in turn, at a steady rate whatever the answers, until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    under_way: set[asyncio.Task[None]] = set()

    async def one(question: Question) -> None:
        answer = await ask(question)
        print(json.dumps([asdict(question), asdict(answer)]), flush=True)

    begun, asked = time.monotonic(), 0
    while not ended.is_set():
        task = asyncio.create_task(one(questions[asked % len(questions)]))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        asked += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), max(0.0, begun + asked / rate - time.monotonic()))
    await asyncio.gather(*under_way)


def question(words: dict[str, Any]) -> Question:
    """Read one question."""
    return Question(**{**words, "headers": tuple(map(tuple, words.get("headers", ())))})


def main() -> None:
    """Read the questions and ask them."""
    questions = list(map(question, json.loads(sys.stdin.read())))
    if len(sys.argv) > 1:
        asyncio.run(steadily(questions, float(sys.argv[1])))
    else:
        print(json.dumps([asdict(each) for each in asyncio.run(all_at_once(questions))]))


if __name__ == "__main__":
    main()
