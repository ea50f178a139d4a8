"""`/healthz`, `/readyz` and `/metrics` on a local port, served by a thread of their own.

/healthz   200 while the event loop answers: the loop's last sign of life is younger than a limit
/readyz    200 when nothing is in the way of Pods, else 503 and what is, a line each
/metrics   the Prometheus text format
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from socket import AF_INET6

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

ALIVE_S = 30.0
"""How long the event loop may be silent before it counts as stuck, in seconds."""


class Health:
    """What the agent says of itself; written by the event loop, read by the server's threads."""

    def __init__(self, not_ready: Callable[[], Sequence[str]]) -> None:
        self.not_ready = not_ready
        self._sign_of_life = time.monotonic()

    def alive(self) -> None:
        """The event loop is at work."""
        self._sign_of_life = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._sign_of_life


class Server:
    """Serves one Health on `address:port`; raises OSError when the port cannot be had."""

    def __init__(self, address: str, health: Health) -> None:
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        self._server = _server_class(host)((host, int(port)), _handler(health))
        self._thread = threading.Thread(target=self._server.serve_forever, name="podwall-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _server_class(host: str) -> type[ThreadingHTTPServer]:
    class LocalServer(ThreadingHTTPServer):
        daemon_threads = True
        if ip_address(host).version == 6:
            address_family = AF_INET6

    return LocalServer


def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "podwall"
        sys_version = ""
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(), CONTENT_TYPE_LATEST)
            elif self.path == "/healthz":
                silent = health.silent_s()
                status = 200 if silent < ALIVE_S else 503
                self._answer(status, f"last sign of life {silent:.1f} s ago\n".encode())
            elif self.path == "/readyz":
                reasons = health.not_ready()
                text = "".join(f"{reason}\n" for reason in reasons) or "ready\n"
                self._answer(503 if reasons else 200, text.encode())
            else:
                self._answer(404, b"/healthz, /readyz, /metrics\n")

        def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  the base class's name
            """A probe every few seconds is no event."""

    return Handler
