"""A server on a real socket that says exactly what a script tells it to."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Scripted:
    """Answers each request with the next answer of its kind; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, queue.Queue[bytes]] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = False
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def say(self, what: str, answer: bytes) -> None:
        """`what` is plural:list or plural:watch."""
        self.answers.setdefault(what, queue.Queue()).put(answer)

    def count(self, what: str) -> int:
        return sum(asked == what for asked, _ in self.asked)

    def close(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for peer in self._open:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            thread = threading.Thread(target=self._serve, args=(peer,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as lines, contextlib.suppress(OSError):
            while first := lines.readline():
                while lines.readline().strip():
                    pass
                target = urlsplit(first.split()[1].decode())
                query = {name: values[0] for name, values in parse_qs(target.query).items()}
                what = f"{target.path.rpartition('/')[2]}:{'watch' if 'watch' in query else 'list'}"
                self.asked.append((what, query))
                peer.sendall(self._next(what))

    def _next(self, what: str) -> bytes:
        waiting = self.answers.setdefault(what, queue.Queue())
        while not self._ended:
            with contextlib.suppress(queue.Empty):
                return waiting.get(timeout=0.02)
        raise OSError("the test is over")


def answer(status: int, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def listing(version: str, *names: str, continues: str = "") -> bytes:
    items = [{"metadata": {"name": name}} for name in names]
    meta = {"resourceVersion": version, "continue": continues}
    return answer(200, json.dumps({"metadata": meta, "items": items}).encode())


def chunks(*pieces: bytes, end: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if end else b"")


def line(type_: str, version: str, name: str = "", **more: Any) -> bytes:
    item = {"metadata": {"name": name, "resourceVersion": version}, **more}
    return json.dumps({"type": type_, "object": item}).encode() + b"\n"
