"""A scripted API server: lists and watches of objects that the benchmark puts there, over plain HTTP.

    benchmark --put, remove--> objects --line--> every watch of their kind

It runs in threads of the benchmark and listens on the loopback of one network namespace. Lists come in pages
when asked for; a watch begins after the resource version it names. Writes are answered and forgotten.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qs, urlsplit

import msgspec

from lab import netns

Object: TypeAlias = dict[str, Any]

PORT = 8001
URL = f"http://127.0.0.1:{PORT}"
BOOKMARK_S = 20.0

_COLLECTIONS = {
    "Node": ("v1", "nodes"),
    "Namespace": ("v1", "namespaces"),
    "Pod": ("v1", "pods"),
    "Service": ("v1", "services"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "EndpointSlice": ("discovery.k8s.io/v1", "endpointslices"),
}
_KINDS = {plural: kind for kind, (_, plural) in _COLLECTIONS.items()}
_OTHERS = {"servicecidrs": "ServiceCIDR", "ipaddresses": "IPAddress", "leases": "Lease", "events": "Event"}


class _Change(NamedTuple):
    version: int
    name: str
    line: bytes


class _Collection:
    """The objects of one kind as JSON, and who watches them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.history: list[_Change] = []
        self.watches: set[_Handler] = set()


class ScriptedApi:
    """One API server, in the network namespace at `where`."""

    def __init__(self, where: Path) -> None:
        self._lock = threading.RLock()
        self._version = 1
        self._collections: dict[str, _Collection] = {}
        self._server = netns.run(where, self._listen)
        self._thread = threading.Thread(target=self._server.serve_forever, name="bench-api", daemon=True)
        self._thread.start()

    def load(self, objects: Iterable[Object]) -> None:
        """Take many objects before anybody watches."""
        for item in objects:
            self._collection(item["kind"]).objects[_name(item)] = self._encoded(item)

    def put(self, item: Object) -> float:
        """Add or change an object; return when its event was about to be sent (time.perf_counter)."""
        with self._lock:
            name, data = _name(item), self._encoded(item)
            of = self._collection(item["kind"])
            word = b"MODIFIED" if name in of.objects else b"ADDED"
            of.objects[name] = data
            return self._tell(of, name, word, data)

    def remove(self, item: Object) -> float:
        """Remove an object; return when its event was about to be sent."""
        with self._lock:
            name, data = _name(item), self._encoded(item)
            of = self._collection(item["kind"])
            del of.objects[name]
            return self._tell(of, name, b"DELETED", data)

    def close(self) -> None:
        """Stop serving; watches end."""
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for of in self._collections.values():
                for watch in of.watches:
                    watch.end()

    def _listen(self) -> ThreadingHTTPServer:
        return _Server(("127.0.0.1", PORT), self._handler)

    def _handler(self, *arguments: Any) -> _Handler:
        return _Handler(self, *arguments)

    def _encoded(self, item: Object) -> bytes:
        self._version += 1
        meta = {**item["metadata"], "resourceVersion": str(self._version)}
        return msgspec.json.encode({**item, "metadata": meta})

    def _collection(self, kind: str) -> _Collection:
        return self._collections.setdefault(kind, _Collection())

    def _tell(self, of: _Collection, name: str, word: bytes, data: bytes) -> float:
        line = b'{"type":"' + word + b'","object":' + data + b"}\n"
        of.history.append(_Change(self._version, name, line))
        begun = time.perf_counter()
        for watch in list(of.watches):
            watch.send(name, line)
        return begun

    # What requests ask

    def listed(self, kind: str, wanted: str, limit: int, start: int) -> tuple[list[bytes], int, int]:
        """Some objects of a kind, the number of those left, and the resource version."""
        with self._lock:
            of = self._collection(kind)
            found = [data for name, data in of.objects.items() if not wanted or name == wanted]
            page = found[start : start + limit] if limit else found
            return page, max(0, len(found) - start - len(page)), self._version

    def watched(self, kind: str, version: int, watch: _Handler) -> None:
        """Send what came after a version, and from now on what comes."""
        with self._lock:
            of = self._collection(kind)
            for change in of.history:
                if change.version > version:
                    watch.send(change.name, change.line)
            of.watches.add(watch)

    def unwatched(self, kind: str, watch: _Handler) -> None:
        """Send no more."""
        with self._lock:
            self._collection(kind).watches.discard(watch)

    @property
    def version(self) -> int:
        """The newest resource version."""
        return self._version


def _name(item: Object) -> str:
    meta = item["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if "namespace" in meta else str(meta["name"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, api: ScriptedApi, *arguments: Any) -> None:
        self._api = api
        self._wanted = ""
        self._ended = threading.Event()
        self._sending = threading.Lock()
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        """List, watch or read one object."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        base, plural, name = _place(url.path)
        if url.path == "/version":
            self._answer(200, b'{"major":"1","minor":"34","gitVersion":"v1.34.4"}')
        elif plural not in _KINDS and plural not in _OTHERS:
            self._answer(404, _status(404, "NotFound"))
        elif name:
            self._one(_kind(plural), name)
        elif query.get("watch") in {"1", "true"}:
            self._watch(_kind(plural), base, query)
        else:
            self._list(_kind(plural), base, query)

    def do_POST(self) -> None:
        """Take a write and forget it."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(201 if self.command == "POST" else 200, body)

    do_PUT = do_PATCH = do_POST  # noqa: N815 - named by http.server

    def send(self, name: str, line: bytes) -> None:
        """Send one line of a watch."""
        if self._wanted and name != self._wanted:
            return
        with self._sending:
            try:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            except OSError:
                self._ended.set()

    def end(self) -> None:
        """End the connection."""
        self._ended.set()

    def _one(self, kind: str, name: str) -> None:
        found, _, _ = self._api.listed(kind, name, 0, 0)
        if found:
            self._answer(200, found[0])
        else:
            self._answer(404, _status(404, "NotFound"))

    def _list(self, kind: str, base: str, query: dict[str, str]) -> None:
        limit, start = int(query.get("limit", 0)), int(query.get("continue") or 0)
        if query.get("resourceVersion") == "0":
            limit = 0  # as the real server's cache answers
        page, left, version = self._api.listed(kind, _field(query), limit, start)
        meta = {"resourceVersion": str(version), **({"continue": str(start + len(page))} if left else {})}
        head = {"kind": f"{kind}List", "apiVersion": base, "metadata": meta}
        self._answer(200, json.dumps(head).encode()[:-1] + b',"items":[' + b",".join(page) + b"]}")

    def _watch(self, kind: str, base: str, query: dict[str, str]) -> None:
        if "sendInitialEvents" in query:
            self._answer(422, _status(422, "Invalid"))
            return
        self._wanted = _field(query)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._api.watched(kind, int(query.get("resourceVersion") or 0), self)
        try:
            while not self._ended.wait(BOOKMARK_S):
                self._bookmark(kind, base)
        finally:
            self._api.unwatched(kind, self)
            self.close_connection = True

    def _bookmark(self, kind: str, base: str) -> None:
        meta = {"resourceVersion": str(self._api.version)}
        line = {"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": base, "metadata": meta}}
        self.send(self._wanted, json.dumps(line).encode() + b"\n")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _place(path: str) -> tuple[str, str, str]:
    """The API's version, the plural and the object's name that a path speaks of."""
    words = path.strip("/").split("/")
    base = "/".join(words[1:2] if words[0] == "api" else words[1:3])
    rest = words[2:] if words[0] == "api" else words[3:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        return base, rest[2], f"{rest[1]}/{rest[3]}" if len(rest) > 3 else ""
    return base, rest[0] if rest else "", rest[1] if len(rest) > 1 else ""


def _kind(plural: str) -> str:
    return _KINDS.get(plural) or _OTHERS[plural]


def _field(query: dict[str, str]) -> str:
    name, _, value = query.get("fieldSelector", "").partition("=")
    return value if name == "metadata.name" else ""


def _status(code: int, reason: str) -> bytes:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
    return json.dumps(status).encode()
