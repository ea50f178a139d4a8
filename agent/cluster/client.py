"""Talks to the API server: small calls, pages of lists, and the beginning of watches.

Everything here blocks; it runs in threads.  Errors are those of `errors`, whatever went wrong below.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from . import wire
from .connection import ANSWER_S, CONNECT_S, Connection, tls_context
from .credentials import Credentials, CredentialSource
from .decode import AnyObject, DecodeError, Page, decode, decode_page
from .errors import Refused, Unauthorized, Unreachable
from .model import Key, Kind, Lease
from .values import object_name, shown

PAGE = 500
MOST_IDLE = 4

LEASE_LABELS = {"app.kubernetes.io/name": "podwall"}
"""By which podwall's Leases are found when it is uninstalled."""

STRATEGIC_MERGE = "application/strategic-merge-patch+json"
JSON = "application/json"
METADATA = f"{JSON};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

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


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects of a kind; both are written as kubectl takes them, empty for all."""

    fields: str = ""
    labels: str = ""

    def query(self) -> dict[str, str]:
        pairs = {"fieldSelector": self.fields, "labelSelector": self.labels}
        return {name: value for name, value in pairs.items() if value}


EVERY = Selection()


class ApiClient:
    """Calls to the API server with the present credentials; safe to use from several threads."""

    def __init__(
        self,
        credentials: CredentialSource,
        agent: str = "podwall",
        connect_s: float = CONNECT_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        """The limits are seconds, of connecting and of each wait for an answer."""
        self._credentials = credentials
        self._agent = agent
        self._limits = connect_s, answer_s
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._tls: tuple[Credentials, ssl.SSLContext | None] | None = None

    def with_limits(self, connect_s: float, answer_s: float) -> ApiClient:
        """Another client with the same credentials."""
        return ApiClient(self._credentials, self._agent, connect_s, answer_s)

    def connection(self) -> Connection:
        """A new connection for the caller alone.  Raises Unauthorized when there are no credentials."""
        credentials = self._credentials.current()
        return Connection(credentials, self._context(credentials), self._agent, *self._limits)

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
        """One object.  Raises NotFound and other ApiErrors, Refused for what is no such object."""
        try:
            return decode(kind, self._call("GET", _path(kind, key)))
        except DecodeError as error:
            raise Refused(str(error)) from error

    def newest(self, kind: Kind, namespace: str) -> int:
        """The highest resource version of the objects of a namespace, as they are now; 0 without any.

        Not of the namespace's history: what was deleted does not count. Raises ApiError.
        """
        newest, continues = 0, ""
        while True:
            query = {"limit": str(PAGE)} | ({"continue": continues} if continues else {})
            data = self._call("GET", f"{_collection(kind, namespace)}?{urlencode(query)}")
            page = _decoded(_VERSIONS, data)
            newest = max([newest, *(_version(item) for item in page.items or ())])
            continues = page.metadata.continue_
            if not continues:
                return newest

    def version_of(self, kind: Kind, key: Key) -> int:
        """An object's resource version now. Raises ApiError, NotFound when there is none."""
        return _version(_decoded(_VERSIONED, self._call("GET", _path(kind, key))))

    def metadata(self, kind: Kind, namespace: str = "") -> Iterator[AnyObject]:
        """The objects of a kind with nothing but their metadata. Raises ApiError."""
        continues = ""
        while True:
            query = {"limit": str(PAGE)} | ({"continue": continues} if continues else {})
            target = f"{_collection(kind, namespace)}?{urlencode(query)}"
            page = decode_page(kind, self._call("GET", target, accept=METADATA))
            yield from page.objects
            continues = page.continues
            if not continues:
                return

    def read(self, target: str) -> Any:
        """The JSON at a path with its query, as it is. Raises ApiError."""
        return json.loads(self._call("GET", target))

    def read_text(self, target: str) -> str:
        """The text at a path with its query, such as a log. Raises ApiError."""
        return self._call("GET", target).decode(errors="replace")

    def version(self) -> str:
        """The API server's version, such as v1.34.4."""
        return str(json.loads(self._call("GET", "/version")).get("gitVersion", ""))

    # Writing

    def write(
        self,
        method: str,
        target: str,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
    ) -> Any:
        """Send any JSON to a path with its query, and return what is answered. Raises ApiError."""
        return json.loads(self._call(method, target, body, content_type))

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
        event: str = "",
    ) -> None:
        """Say something about an object, for `kubectl describe` and `kubectl get events`.

        A reason and an action are one word in upper camel case; the note is cut after 1,024 bytes. `event`
        names the Event, so that several who say the same make one: raises Conflict for all but the first.
        """
        namespace, name = ("default", key) if isinstance(key, str) else key
        now = datetime.now(UTC)
        regarding = {"kind": kind, "name": name, "apiVersion": _api_version(kind), "uid": uid}
        if not isinstance(key, str):
            regarding["namespace"] = namespace
        body = {
            "metadata": {"namespace": namespace, "name": event or _event_name(name)},
            "eventTime": _time(now, "microseconds"),
            "reportingController": "podwall.dev/agent",
            "reportingInstance": instance or os.uname().nodename,
            "regarding": regarding,
            "reason": reason,
            "action": action,
            "note": note.encode()[:1024].decode(errors="ignore"),
            "type": "Warning" if warning else "Normal",
        }
        self._call("POST", _collection("Event", namespace), body)

    def get_lease(self, namespace: str, name: str) -> Lease:
        """A Lease.  Raises NotFound."""
        return _lease(self._call("GET", _path("Lease", (namespace, name))))

    def create_lease(self, lease: Lease) -> Lease:
        """Make a Lease.  Raises Conflict when there is one."""
        return _lease(self._call("POST", _collection("Lease", lease.namespace), _lease_body(lease)))

    def update_lease(self, lease: Lease) -> Lease:
        """Change a Lease as it was read.  Raises Conflict when somebody was faster, also in removing it."""
        return _lease(self._call("PUT", _path("Lease", (lease.namespace, lease.name)), _lease_body(lease)))

    def delete_lease(self, lease: Lease) -> None:
        """Remove a Lease as it was read.  Raises NotFound, and Conflict when it was changed meanwhile."""
        path = _path("Lease", (lease.namespace, lease.name))
        self._call("DELETE", path, {"preconditions": {"resourceVersion": lease.resource_version}})

    # The way there

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        try:
            return self._once(method, path, data, content_type, accept)
        except Unauthorized:
            return self._once(method, path, data, content_type, accept)  # by now with what the files say

    def _once(self, method: str, path: str, body: bytes | None, *types: str) -> bytes:
        connection = self._borrow(fresh=method == "POST")
        reused = connection.used
        try:
            try:
                return connection.read(connection.request(method, path, body, *types))
            except Unreachable:
                if not reused:
                    raise
                # The server had closed it meanwhile, as it may; only a fresh connection tells more.
                return connection.read(connection.request(method, path, body, *types))
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


_VERSIONED = msgspec.json.Decoder(wire.Versioned)
_VERSIONS = msgspec.json.Decoder(wire.Page[wire.Versioned])


def _decoded(decoder: msgspec.json.Decoder[Value], data: bytes) -> Value:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise Unreachable(f"the API server's answer is no object of the API: {error}") from error


def _version(item: wire.Versioned) -> int:
    """Resource versions of one kind are numbers that grow (Kubernetes enhancement 5504)."""
    text = item.metadata.resource_version or ""
    if not text.isdecimal():
        raise Unreachable(f"{shown(text)} is no resource version that can be compared")
    return int(text)


def _api_version(kind: str) -> str:
    return _PATHS[kind][0].removeprefix("/apis/").removeprefix("/api/")


def _event_name(name: str) -> str:
    return f"{name[:200].rstrip('.-')}.{random.getrandbits(64):016x}"


def _time(when: datetime, precision: str) -> str:
    return when.astimezone(UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def _lease_body(lease: Lease) -> dict[str, Any]:
    metadata: dict[str, Any] = {"namespace": lease.namespace, "name": lease.name, "labels": LEASE_LABELS}
    if lease.resource_version:
        metadata["resourceVersion"] = lease.resource_version
    if lease.uid:
        metadata["uid"] = lease.uid  # without it the server makes a Lease anew that was removed
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
            uid=meta["uid"],
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"the API server's Lease cannot be read: {error}") from error
