"""Talks to the API server: small calls, and the connections on which lists and watches stream.

`http.client` of the standard library: it costs 1 MB of memory (urllib3 4, aiohttp 13), and it leaves the
socket in our hands, so that a watch in another thread can be ended at once.  Everything here blocks; it runs
in threads.  Errors are those of `errors`, whatever went wrong below.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from .credentials import Credentials, CredentialSource
from .decode import AnyObject, DecodeError, Page, decode, decode_page, decode_status
from .errors import BY_STATUS, ApiError, Refused, Unauthorized, Unreachable
from .model import Key, Kind
from .values import object_name, shown

CONNECT_S = 5.0
ANSWER_S = 30.0
PAGE = 500
MOST_IDLE = 4
CHUNK = 65536
LONGEST_LINE = 16 * 1024 * 1024

STRATEGIC_MERGE = "application/strategic-merge-patch+json"

_PATHS: Mapping[str, tuple[str, str]] = {
    "Node": ("/api/v1", "nodes"),
    "Namespace": ("/api/v1", "namespaces"),
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "EndpointSlice": ("/apis/discovery.k8s.io/v1", "endpointslices"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
}


class Lease(msgspec.Struct, frozen=True):
    """Who holds something for how long; an empty `resource_version` is one that was not read from the API."""

    namespace: str
    name: str
    holder: str = ""
    duration_s: int = 15
    acquired: datetime | None = None
    renewed: datetime | None = None
    transitions: int = 0
    resource_version: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects of a kind; both are written as kubectl takes them, empty for all."""

    fields: str = ""
    labels: str = ""

    def query(self) -> dict[str, str]:
        pairs = {"fieldSelector": self.fields, "labelSelector": self.labels}
        return {name: value for name, value in pairs.items() if value}


EVERY = Selection()


class Connection:
    """One connection, used by one thread; `abort` may be called by any other."""

    def __init__(self, credentials: Credentials, tls: ssl.SSLContext | None, agent: str) -> None:
        self.credentials = credentials
        self.used = False
        self._headers = {"User-Agent": agent, "Accept": "application/json"}
        if credentials.authorization:
            self._headers["Authorization"] = credentials.authorization
        self._tls = tls
        self._http: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._aborted = False

    @property
    def open(self) -> bool:
        """Is there anything to close?"""
        return self._http is not None

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        answer_s: float = ANSWER_S,
    ) -> http.client.HTTPResponse:
        """Send a request and return the answer's head; any status but 2xx is raised as an ApiError."""
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            if self._http is None:
                self._http = self._connect()
            assert self._socket is not None
            self._socket.settimeout(answer_s)
            self._http.request(method, target, body=body, headers=headers)
            response = self._http.getresponse()
            if response.status >= 300:
                raise _error(response, method, target)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise self._unreachable(error) from error
        self.used = True
        return response

    def lines(self, response: http.client.HTTPResponse, silence_s: float) -> Iterator[list[bytes]]:
        """The answer's lines as they come, as many at a time as are there; ends when the server ends it.

        Raises Unreachable, also after `silence_s` seconds without a byte.
        """
        assert self._socket is not None
        rest = b""
        try:
            self._socket.settimeout(silence_s)
            while chunk := response.read1(CHUNK):
                *lines, rest = (rest + chunk if rest else chunk).split(b"\n")
                if lines:
                    yield lines
                elif len(rest) > LONGEST_LINE:
                    raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            if rest:
                yield [rest]
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise self._unreachable(error) from error

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """The whole answer.  Raises Unreachable."""
        try:
            return response.read()
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Close it; the next request opens another."""
        with self._lock:
            connection, self._http, self._socket = self._http, None, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """End it for good, whatever its thread is doing with it: that raises Unreachable there."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):
                    # Below TLS: the thread that reads holds the TLS object.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _connect(self) -> http.client.HTTPConnection:
        server = urlsplit(self.credentials.server)
        host, port = server.hostname or "", server.port or (443 if server.scheme == "https" else 80)
        connection = http.client.HTTPConnection(host, port)
        raw = self._open(host, port)
        self._keep(raw)
        try:
            if self._tls is not None:
                raw = self._tls.wrap_socket(raw, server_hostname=self.credentials.server_name or host)
                self._keep(raw)
        except BaseException:
            raw.close()
            raise
        connection.sock = raw
        return connection

    def _open(self, host: str, port: int) -> socket.socket:
        if self.credentials.proxy:
            proxy = urlsplit(self.credentials.proxy)
            tunnel = http.client.HTTPConnection(proxy.hostname or "", proxy.port or 80, timeout=CONNECT_S)
            tunnel.set_tunnel(host, port)
            tunnel.connect()
            raw: socket.socket = tunnel.sock
        else:
            raw = socket.create_connection((host, port), timeout=CONNECT_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A server that has vanished without a word is noticed after 30 s, not after the silence limit.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        return raw

    def _keep(self, raw: socket.socket) -> None:
        with self._lock:
            if self._aborted:
                raw.close()
                raise OSError("the connection is not wanted any more")
            self._socket = raw

    def _unreachable(self, error: Exception) -> Unreachable:
        why = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            why = "no answer in time"
        return Unreachable(f"API server {self.credentials.server}: {why}")


class ApiClient:
    """Calls to the API server with the present credentials; safe to use from several threads."""

    def __init__(self, credentials: CredentialSource, agent: str = "podwall") -> None:
        self._credentials = credentials
        self._agent = agent
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._tls: tuple[Credentials, ssl.SSLContext | None] | None = None

    def connection(self) -> Connection:
        """A new connection for the caller alone.  Raises Unauthorized when there are no credentials."""
        credentials = self._credentials.current()
        return Connection(credentials, self._context(credentials), self._agent)

    def refused(self, connection: Connection) -> None:
        """Say that the server did not accept a connection's credentials."""
        self._credentials.refused(connection.credentials)

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # Reading

    def get(self, kind: Kind, key: Key) -> AnyObject:
        """One object.  Raises NotFound, other ApiErrors, and DecodeError."""
        return decode(kind, self._call("GET", _path(kind, key)))

    def version(self) -> str:
        """The API server's version, such as v1.34.4."""
        return str(json.loads(self._call("GET", "/version")).get("gitVersion", ""))

    # Writing

    def set_node_condition(self, node: str, kind: str, status: bool, reason: str, message: str) -> None:
        """Set one condition of a Node's status and leave the others to their owners."""
        now = _time(datetime.now(UTC), "seconds")
        condition = {
            "type": kind,
            "status": str(status),
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        self.patch("Node", node, {"status": {"conditions": [condition]}}, "status")

    def patch(self, kind: Kind, key: Key, change: Mapping[str, Any], subresource: str = "") -> None:
        """Change some fields of an object by strategic merge."""
        path = _path(kind, key) + (f"/{subresource}" if subresource else "")
        self._call("PATCH", path, change, STRATEGIC_MERGE)

    def create_event(
        self,
        kind: Kind,
        key: Key,
        uid: str,
        *,
        reason: str,
        note: str,
        action: str,
        warning: bool = True,
        instance: str = "",
    ) -> None:
        """Say something about an object, for `kubectl describe` and `kubectl get events`.

        A reason and an action are one word in upper camel case; the note is cut after 1,024 bytes.
        """
        namespace, name = ("default", key) if isinstance(key, str) else key
        now = datetime.now(UTC)
        regarding = {"kind": kind, "name": name, "apiVersion": _api_version(kind), "uid": uid}
        if not isinstance(key, str):
            regarding["namespace"] = namespace
        event = {
            "metadata": {"namespace": namespace, "name": _event_name(name)},
            "eventTime": _time(now, "microseconds"),
            "reportingController": "podwall.dev/agent",
            "reportingInstance": instance or os.uname().nodename,
            "regarding": regarding,
            "reason": reason,
            "action": action,
            "note": note.encode()[:1024].decode(errors="ignore"),
            "type": "Warning" if warning else "Normal",
        }
        self._call("POST", _collection("Event", namespace), event)

    def get_lease(self, namespace: str, name: str) -> Lease:
        """A Lease.  Raises NotFound."""
        return _lease(self._call("GET", _path("Lease", (namespace, name))))

    def create_lease(self, lease: Lease) -> Lease:
        """Make a Lease.  Raises Conflict when there is one."""
        return _lease(self._call("POST", _collection("Lease", lease.namespace), _lease_body(lease)))

    def update_lease(self, lease: Lease) -> Lease:
        """Change a Lease as it was read.  Raises Conflict when somebody else was faster."""
        return _lease(self._call("PUT", _path("Lease", (lease.namespace, lease.name)), _lease_body(lease)))

    # The way there

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        try:
            return self._once(method, path, data, content_type)
        except Unauthorized:
            return self._once(method, path, data, content_type)  # by now with what the files say

    def _once(self, method: str, path: str, body: bytes | None, content_type: str) -> bytes:
        connection = self._borrow(fresh=method == "POST")
        reused = connection.used
        try:
            try:
                return connection.read(connection.request(method, path, body, content_type))
            except Unreachable:
                if not reused:
                    raise
                # The server had closed it meanwhile, as it may; only a fresh connection tells more.
                return connection.read(connection.request(method, path, body, content_type))
        except Unauthorized:
            self.refused(connection)
            connection.close()
            raise
        finally:
            self._give_back(connection)

    def _borrow(self, fresh: bool) -> Connection:
        credentials = self._credentials.current()
        with self._lock:
            while self._idle and not fresh:
                connection = self._idle.pop()
                if connection.credentials == credentials:
                    return connection
                connection.close()
        return self.connection()

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if connection.open and len(self._idle) < MOST_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _context(self, credentials: Credentials) -> ssl.SSLContext | None:
        with self._lock:
            if self._tls is None or self._tls[0] != credentials:
                self._tls = credentials, tls_context(credentials)
            return self._tls[1]


def read_page(
    connection: Connection, kind: Kind, selection: Selection = EVERY, continues: str = "", limit: int = PAGE
) -> Page:
    """One page of a list, as it is now.  Raises Gone when it took too long to come back for the next one."""
    query = {"limit": str(limit), **selection.query()}
    if continues:
        query["continue"] = continues
    response = connection.request("GET", f"{_collection(kind)}?{urlencode(query)}")
    try:
        return decode_page(kind, connection.read(response))
    except msgspec.DecodeError as error:
        raise Unreachable(f"the list of {kind} is no list of the API: {error}") from error


def open_watch(
    connection: Connection, kind: Kind, version: str, selection: Selection, limit_s: int
) -> http.client.HTTPResponse:
    """Begin to watch from a resource version; the server ends it after `limit_s` seconds."""
    query = {
        "watch": "1",
        "resourceVersion": version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": str(limit_s),
        **selection.query(),
    }
    return connection.request("GET", f"{_collection(kind)}?{urlencode(query)}")


def tls_context(credentials: Credentials) -> ssl.SSLContext | None:
    """TLS as the credentials want it; None for plain HTTP.  Raises Unauthorized for unusable ones."""
    if not credentials.server.startswith("https:"):
        return None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not credentials.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif credentials.ca:
            context.load_verify_locations(cadata=credentials.ca)
        else:
            context.load_default_certs()
        if credentials.certificate:
            _load_certificate(context, credentials)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise Unauthorized(
            f"the CA, certificate or key for the API server cannot be used: {error}"
        ) from error
    return context


def _load_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    """OpenSSL reads a certificate's key from a file only: one in memory, which no disk ever sees."""
    descriptor = os.memfd_create("podwall-credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, f"{credentials.certificate}\n{credentials.key}".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _error(response: http.client.HTTPResponse, method: str, target: str) -> ApiError:
    body = response.read(LONGEST_LINE)
    status = decode_status(body)
    text = status.message or body[:200].decode(errors="replace").strip() or response.reason
    wait = response.getheader("Retry-After") or ""
    kind = BY_STATUS.get(response.status, Refused)
    return kind(
        f"{method} {urlsplit(target).path}: {response.status} {text}",
        response.status,
        status.reason,
        float(wait) if wait.isascii() and wait.isdigit() else None,
    )


def _collection(kind: str, namespace: str = "") -> str:
    base, plural = _PATHS[kind]
    return f"{base}/namespaces/{_name(namespace)}/{plural}" if namespace else f"{base}/{plural}"


def _path(kind: str, key: Key) -> str:
    namespace, name = ("", key) if isinstance(key, str) else key
    return f"{_collection(kind, namespace)}/{_name(name)}"


def _name(name: str) -> str:
    """A name inside a path: none that could be more than a name ever gets there."""
    if not object_name(name):
        raise Refused(f"{shown(name)} is not the name of an object", 422, "Invalid")
    return quote(name, safe="")


def _api_version(kind: str) -> str:
    return _PATHS[kind][0].removeprefix("/apis/").removeprefix("/api/")


def _event_name(name: str) -> str:
    return f"{name[:200].rstrip('.-')}.{random.getrandbits(64):016x}"


def _time(when: datetime, precision: str) -> str:
    return when.astimezone(UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def _lease_body(lease: Lease) -> dict[str, Any]:
    metadata = {"namespace": lease.namespace, "name": lease.name}
    if lease.resource_version:
        metadata["resourceVersion"] = lease.resource_version
    spec: dict[str, Any] = {
        "holderIdentity": lease.holder,
        "leaseDurationSeconds": lease.duration_s,
        "leaseTransitions": lease.transitions,
    }
    if lease.acquired:
        spec["acquireTime"] = _time(lease.acquired, "microseconds")
    if lease.renewed:
        spec["renewTime"] = _time(lease.renewed, "microseconds")
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


class _WireLease(msgspec.Struct):
    metadata: dict[str, Any]
    spec: dict[str, Any] = {}


def _lease(data: bytes) -> Lease:
    try:
        item = msgspec.json.decode(data, type=_WireLease)
        meta, spec = item.metadata, item.spec
        times = {name: spec.get(name) for name in ("acquireTime", "renewTime")}
        return Lease(
            namespace=meta["namespace"],
            name=meta["name"],
            holder=spec.get("holderIdentity") or "",
            duration_s=spec.get("leaseDurationSeconds") or 15,
            acquired=datetime.fromisoformat(times["acquireTime"]) if times["acquireTime"] else None,
            renewed=datetime.fromisoformat(times["renewTime"]) if times["renewTime"] else None,
            transitions=spec.get("leaseTransitions") or 0,
            resource_version=meta["resourceVersion"],
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise DecodeError("Lease", "", "(the whole object)", str(error)) from error
