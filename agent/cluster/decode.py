"""Bytes of the API server, or objects of a manifest, become the frozen model.

    bytes --msgspec--> wire structs --checked--> model            every object that is as it should be
      `--msgspec--> dict --without the unusable fields--> wire --> model, with problems

Nothing here fails for one bad field: it is left out and named in the object's `problems`.  Only an object
without an identity (or whose labels, which decide what selects it, cannot be read) is refused: `DecodeError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import msgspec

from . import wire
from .decode_pod import namespace_of, node_of, pod_of
from .decode_policy import policy_of
from .decode_service import endpoints_of, service_of, slice_of, timestamp
from .model import (
    Endpoints,
    Key,
    Kind,
    NetworkPolicy,
    Object,
    Problem,
)
from .values import MOST_LEFT_OUT, Found, object_name, shown

AnyKind: TypeAlias = Kind | Literal["Endpoints"]
AnyObject: TypeAlias = Object | Endpoints

_CLUSTER_SCOPED = frozenset(("Node", "Namespace"))
_ERROR_PATH = re.compile(r"(?s)(.*) - at `(?:key in )?\$([^`]*)`")
_PATH_STEP = re.compile(r"\.([A-Za-z0-9_]+)|\[(\d+)\]|(\[\.\.\.\])")


_HEADS: tuple[tuple[Literal["ADDED", "MODIFIED"], bytes], ...] = (
    ("MODIFIED", b'{"type":"MODIFIED","object":'),
    ("ADDED", b'{"type":"ADDED","object":'),
)


class DecodeError(Exception):
    """An object that cannot be used at all; `field` says what in it, `name` what is known of its name."""

    def __init__(self, kind: str, name: str, field: str, message: str) -> None:
        self.kind, self.name, self.field, self.message = kind, name, field, message
        super().__init__(f"{kind} {name or '(without a name)'}: {field}: {message}")


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; `continues` is empty on the last one."""

    objects: tuple[AnyObject, ...]
    refused: tuple[DecodeError, ...]
    resource_version: str
    continues: str


class Change(msgspec.Struct, frozen=True):
    """One event of a watch; `object` is None for BOOKMARK, DELETED, ERROR and a refused object."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    resource_version: str = ""
    object: AnyObject | None = None
    key: Key | None = None
    refused: DecodeError | None = None
    status: wire.Status | None = None


def decode(kind: AnyKind, data: bytes | Mapping[str, Any]) -> AnyObject:
    """One object from its JSON or from plain dicts and lists; raises DecodeError."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        return _salvaged(kind, data)
    reader = _READERS[kind]
    try:
        item = reader.decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _salvaged(kind, _tree(kind, data))
    return _built(kind, reader, item, [])


def decode_page(kind: AnyKind, data: bytes) -> Page:
    """One page of a list; an object that cannot be used does not touch the others."""
    reader = _READERS[kind]
    try:
        page = reader.page_decoder.decode(data)
    except (msgspec.ValidationError, RecursionError):
        return _page_one_by_one(kind, data)
    objects, refused = _each(page.items or (), lambda item: _built(kind, reader, item, []))
    return Page(objects, refused, page.metadata.resource_version, page.metadata.continue_)


def decode_change(kind: AnyKind, line: bytes) -> Change:
    """One line of a watch; raises msgspec.DecodeError when it is no event.

    Most lines are read in one go, past the envelope that the API server always writes alike.
    """
    for type_, head in _HEADS:
        if line.startswith(head) and line.endswith(b"}"):
            reader = _READERS[kind]
            try:
                item = reader.decoder.decode(memoryview(line)[len(head) : -1])
                found = _built(kind, reader, item, [])
            except (msgspec.DecodeError, DecodeError, RecursionError):
                break  # what is wrong in it, and where, is found out below
            return Change(type_, item.metadata.resource_version or "", found, found.key)
    return _decode_any_change(kind, line)


def _decode_any_change(kind: AnyKind, line: bytes) -> Change:
    event = _WATCH_EVENT.decode(line)
    if event.type == "ERROR":
        return Change("ERROR", status=_STATUS.decode(event.object))
    if event.type in {"BOOKMARK", "DELETED"}:
        meta = _IDENTITY.decode(event.object).metadata
        key = _key(kind, meta) if event.type == "DELETED" else None
        return Change(cast("Any", event.type), meta.resource_version or "", key=key)
    version = _version(event.object)
    try:
        found = decode(kind, bytes(event.object))
    except DecodeError as error:
        return Change(cast("Any", event.type), version, refused=error)
    return Change(cast("Any", event.type), version, found, found.key)


def decode_status(data: bytes) -> wire.Status:
    """What the API server answers instead of an object; empty when the bytes are nothing of the kind."""
    try:
        return _STATUS.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return wire.Status()


def _version(data: msgspec.Raw) -> str:
    """The resource version of an object, whatever else is wrong in it; "" when there is none."""
    try:
        return _VERSIONED.decode(data).metadata.resource_version or ""
    except msgspec.DecodeError:
        return ""


def _tree(kind: AnyKind, data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(kind, "", "(the whole object)", f"is not JSON: {error}") from error


def _page_one_by_one(kind: AnyKind, data: bytes) -> Page:
    page = _RAW_PAGE.decode(data)
    objects, refused = _each(page.items or (), lambda item: decode(kind, bytes(item)))
    return Page(objects, refused, page.metadata.resource_version, page.metadata.continue_)


def _each(
    items: Iterable[Any], read: Callable[[Any], AnyObject]
) -> tuple[tuple[AnyObject, ...], tuple[DecodeError, ...]]:
    objects, refused = [], []
    for item in items:
        try:
            objects.append(read(item))
        except DecodeError as error:
            refused.append(error)
    return tuple(objects), tuple(refused)


def _salvaged(kind: AnyKind, tree: object) -> AnyObject:
    """The object without the fields of a wrong type, which become its problems."""
    reader, found = _READERS[kind], cast("Found", [])
    for _ in range(MOST_LEFT_OUT):
        try:
            item = msgspec.convert(tree, reader.wire)
        except msgspec.ValidationError as error:
            tree = _without_bad_field(kind, tree, str(error), found)
        else:
            return _built(kind, reader, item, found)
    raise DecodeError(kind, _name_in(tree), found[-1].field, "has too many fields of a wrong type")


def _without_bad_field(kind: AnyKind, tree: object, error: str, found: Found) -> object:
    """A copy of the tree without the field that msgspec complains about, which is added to `found`."""
    match = _ERROR_PATH.fullmatch(error)
    steps = _steps(match.group(2)) if match else []
    field = _field(steps)
    message = match.group(1) if match else error
    if not steps or (steps[:1] == ["metadata"] and _decides(kind, steps)):
        raise DecodeError(kind, _name_in(tree), field or "(the whole object)", message)
    found.append(Problem(field, message))
    return _without(tree, steps)


def _decides(kind: AnyKind, steps: list[str | int]) -> bool:
    """Does this part of the metadata say which object it is, or what selects it?"""
    if len(steps) == 1 or steps[1] in ("name", "namespace"):
        return True
    return steps[1] == "labels" and kind in {"Pod", "Namespace"}


def _steps(path: str) -> list[str | int]:
    steps: list[str | int] = []
    for name, index, any_key in _PATH_STEP.findall(path):
        if any_key:
            break  # msgspec does not say which key of a map: the map itself is left out
        steps.append(name or int(index))
    return steps


def _field(steps: list[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _without(tree: Any, steps: list[str | int]) -> Any:
    step, *rest = steps
    if isinstance(tree, dict):
        if rest:
            return {**tree, step: _without(tree[step], rest)}
        return {key: value for key, value in tree.items() if key != step}
    index = cast("int", step)
    part = [_without(tree[index], rest)] if rest else []
    return [*tree[:index], *part, *tree[index + 1 :]]


def _name_in(tree: object) -> str:
    meta = tree.get("metadata") if isinstance(tree, dict) else None
    name = meta.get("name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else ""


def _key(kind: AnyKind, meta: wire.Meta) -> Key:
    name = meta.name or ""
    return name if kind in _CLUSTER_SCOPED else (meta.namespace or "default", name)


def _built(kind: AnyKind, reader: _Reader, item: Any, found: Found) -> AnyObject:
    name = item.metadata.name
    if not name:
        raise DecodeError(kind, "", "metadata.name", "is missing")
    if not object_name(name):
        found.append(Problem("metadata.name", f"{shown(name)} is not a DNS name as objects have"))
    return reader.build(item, found)


def _policy_of(item: wire.NetworkPolicy, found: Found) -> NetworkPolicy:
    meta = item.metadata
    base = NetworkPolicy(
        namespace=meta.namespace or "default",
        name=meta.name or "",
        uid=meta.uid or "",
        created=timestamp(meta.creation_timestamp, found),
        generation=meta.generation or 0,
        annotations=meta.annotations or {},
        deleting=meta.deletion_timestamp is not None,
    )
    policy = policy_of(base, item.spec, found)
    return msgspec.structs.replace(policy, problems=tuple(found)) if found else policy


class _Reader:
    """How one kind is read."""

    def __init__(self, item: type[wire.Wire], build: Callable[[Any, Found], AnyObject]) -> None:
        self.wire = item
        self.build = build
        self.decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(item)
        self.page_decoder: msgspec.json.Decoder[wire.Page[Any]] = msgspec.json.Decoder(
            wire.Page[item]  # type: ignore[valid-type]
        )


_READERS: dict[AnyKind, _Reader] = {
    "Node": _Reader(wire.Node, node_of),
    "Namespace": _Reader(wire.Namespace, namespace_of),
    "Pod": _Reader(wire.Pod, pod_of),
    "NetworkPolicy": _Reader(wire.NetworkPolicy, _policy_of),
    "Service": _Reader(wire.Service, service_of),
    "EndpointSlice": _Reader(wire.EndpointSlice, slice_of),
    "Endpoints": _Reader(wire.Endpoints, endpoints_of),
}
_WATCH_EVENT = msgspec.json.Decoder(wire.WatchEvent)
_IDENTITY = msgspec.json.Decoder(wire.Identity)
_VERSIONED = msgspec.json.Decoder(wire.Versioned)
_STATUS = msgspec.json.Decoder(wire.Status)
_RAW_PAGE = msgspec.json.Decoder(wire.Page[msgspec.Raw])
