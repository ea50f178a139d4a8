"""Serves the page on 127.0.0.1, and answers what it asks.

GET /, /app.js, ...        the page's files, as they were read at the start: there is no path to follow
GET /api/..., POST /api/... plain data, with the token alone (agent.ui.guard)
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import click

from agent.ui import questions
from agent.ui.guard import API, HEADERS, refusal
from agent.ui.live import Live
from agent.ui.questions import CannotBeAnsweredError

ADDRESS = "127.0.0.1"
IDLE_S = 15
LARGEST_BODY = 1 << 20
TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
JSON = "application/json"

log = logging.getLogger(__name__)


class PageServer(ThreadingHTTPServer):
    """The server; `serve_forever` answers until `shutdown`. Port 0 takes any free one. Raises OSError."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, live: Live, port: int) -> None:
        self.live = live
        self.token = secrets.token_urlsafe(32)
        self.files = page_files()
        super().__init__((ADDRESS, port), _Handler)

    @property
    def url(self) -> str:
        """The page's address, with the token."""
        return f"http://{ADDRESS}:{self.server_port}/#token={self.token}"

    def server_bind(self) -> None:
        """Bind, without asking DNS for the machine's name as the standard library would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            log.exception("event=ui-failed")


def page_files() -> dict[str, tuple[str, bytes]]:
    """Every file of the page by its path in URLs: its content type and content."""
    found: dict[str, tuple[str, bytes]] = {}

    def add(directory: Traversable, path: str) -> None:
        for item in directory.iterdir():
            suffix = f".{item.name.rpartition('.')[2]}"
            if item.is_dir():
                add(item, f"{path}{item.name}/")
            elif suffix in TYPES:
                found[f"{path}{item.name}"] = TYPES[suffix], item.read_bytes()

    add(files("agent.ui") / "static", "/")
    found["/"] = found["/index.html"]
    return found


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "podwall"
    sys_version = ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if self._refused(url.path):
            return
        if url.path.startswith(API):
            self._answer(questions.GET, url.path, dict(parse_qsl(url.query)))
        elif url.path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[url.path])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self.close_connection = True  # what follows is not read
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        body = self.rfile.read(int(length))
        if self._refused(url.path):
            return
        if self.headers.get_content_type() != JSON:
            self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
            return
        try:
            given = json.loads(body)
        except ValueError:
            given = None
        if not isinstance(given, dict) or not all(isinstance(each, str) for each in given.values()):
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": "the body is no JSON object of texts"})
            return
        self._answer(questions.POST, url.path, given)

    def _refused(self, path: str) -> bool:
        headers = {name.lower(): value for name, value in self.headers.items()}
        refused = refusal(path, headers, self.server.token)
        if refused is not None:
            self._send_json(HTTPStatus(refused.status), {"error": refused.message})
        return refused is not None

    def _answer(self, answers: Mapping[str, questions.Answer], path: str, given: Mapping[str, str]) -> None:
        if path not in answers:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"nothing is answered at {path}"})
            return
        try:
            content = answers[path](self.server.live, given)
        except CannotBeAnsweredError as error:
            self._send_json(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)})
        except click.ClickException as error:
            self._send_json(HTTPStatus.BAD_GATEWAY, {"error": error.message})
        except Exception:
            log.exception("event=ui-failed path=%r", path)
            self._send_json(
                HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "podwall ui failed at this: its log says how"}
            )
        else:
            self._send_json(HTTPStatus.OK, content)

    def _send_json(self, status: HTTPStatus, content: Mapping[str, Any]) -> None:
        self._send(status, JSON, json.dumps(content).encode())

    def _send(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Plain text that repeats nothing of the request, unlike the standard library's page."""
        status = HTTPStatus(code)
        self._send(status, TYPES[".txt"], f"{status.value} {status.phrase}\n".encode())

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
        log.debug("event=ui-request " + format, *args)
