"""Ordinary manifests as a source of events: the cluster for the lab, and for commands without a cluster.

    files --split at '---'--> documents --List unfolded--> decode --Endpoints become EndpointSlices--> objects

A document that cannot be read is named by file, number and line, and the others go on.  `ManifestSource`
keeps the last version of a file in which everything could be read: half of an edit must not open what the
rest of it closed.  Every namespace that something lives in exists, labelled as the API server would.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from .decode import AnyKind, AnyObject, DecodeError, decode
from .mirror import mirrored
from .model import (
    KINDS,
    NAMESPACE_NAME_LABEL,
    Endpoints,
    Event,
    Key,
    Kind,
    Namespace,
    Node,
    Object,
    Remove,
    Service,
    Synced,
    Upsert,
    kind_of,
)
from .values import shown

SUFFIXES = (".yaml", ".yml", ".json")
POLL_S = 0.05

_API_VERSIONS: Mapping[str, str] = {
    "Node": "v1",
    "Namespace": "v1",
    "Pod": "v1",
    "Service": "v1",
    "Endpoints": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "EndpointSlice": "discovery.k8s.io/v1",
}
_SEPARATOR = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_DEEPEST, _LARGEST = 100, 5_000_000
_YOUNG_S = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document stands; `item` is its position in a List."""

    path: Path
    number: int
    line: int
    item: str = ""

    def __str__(self) -> str:
        return f"{self.path}, document {self.number} (line {self.line}){self.item}"


@dataclass(frozen=True, slots=True)
class ManifestError:
    """What cannot be read, where, and why."""

    place: Place | Path
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Document:
    """One object of any kind, as it is written; Lists are unfolded."""

    place: Place
    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        kind = self.body.get("kind")
        return kind if isinstance(kind, str) else ""


@dataclass(slots=True)
class Parsed:
    """What one file says; `documents` has the kinds that podwall does not read itself, too."""

    documents: list[Document] = field(default_factory=list)
    found: list[tuple[Place, AnyObject]] = field(default_factory=list)
    errors: list[ManifestError] = field(default_factory=list)


@dataclass(slots=True)
class Manifests:
    """What all files say together.

    `errors` are documents that could not be read, `problems` what is wrong in the objects that there are;
    `places` says where an object stands (slices made of Endpoints and namespaces nobody wrote stand nowhere).
    """

    objects: list[Object] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    errors: list[ManifestError] = field(default_factory=list)
    problems: list[ManifestError] = field(default_factory=list)
    places: dict[tuple[AnyKind, Key], Place] = field(default_factory=dict)


class _Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: no timestamps and no numbers to the base 60; every alias counted."""


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in resolvers if not entry[0].endswith((":timestamp", ":int", ":float"))]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)\Z"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:[eE][-+]?[0-9]+)?\Z|[-+]?[0-9][0-9_]*\.\Z"),
    list("-+0123456789."),
)


def load(paths: Iterable[Path]) -> Manifests:
    """All objects of these files and directories (not below); a later one replaces its namesake."""
    parsed = []
    errors: list[ManifestError] = []
    for path in _files(paths, errors):
        try:
            parsed.append(parse(path, path.read_bytes()))
        except OSError as error:
            errors.append(ManifestError(path, f"cannot be read: {error.strerror}"))
    result = merged(parsed)
    result.errors[:0] = errors
    return result


def parse(path: Path, data: bytes) -> Parsed:
    """What one file says; `path` is only used to name it and to tell JSON from YAML."""
    result = Parsed()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        result.errors.append(ManifestError(path, f"is not UTF-8 text (byte {error.start})"))
        return result
    for place, chunk in _split(path, text):
        _read_document(place, chunk, result)
    for document in result.documents:
        _decode(document, result)
    return result


def merged(parts: Iterable[Parsed]) -> Manifests:
    """Several files as one cluster."""
    result = Manifests()
    objects: dict[tuple[AnyKind, Key], AnyObject] = {}
    for part in parts:
        result.documents += part.documents
        result.errors += part.errors
        for place, item in part.found:
            _add(place, item, objects, result)
    result.objects = _completed(objects)
    return result


class ManifestSource:
    """Events from the manifests of a directory, which may be edited meanwhile.

    `report` gets each error once, when it appears; without it they are logged.
    """

    def __init__(
        self,
        directory: Path,
        kinds: Iterable[Kind] = KINDS,
        report: Callable[[ManifestError], None] | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self.directory = directory
        self._kinds = tuple(kinds)
        self._report = report or _log
        self._poll_s = poll_s
        self._files: dict[Path, _File] = {}
        self._delivered: dict[tuple[Kind, Key], Object] = {}
        self._reported: frozenset[str] = frozenset()
        self._listed = False

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Deliver what is there, Synced, and then each change, until cancelled."""
        while True:
            if self._looks_changed() or not self._listed:
                objects = await asyncio.to_thread(self._read)
                if objects is not None:
                    self._deliver(objects, deliver)
            await asyncio.sleep(self._poll_s)

    def _looks_changed(self) -> bool:
        try:
            found = {path: _signature(path) for path in _manifests_in(self.directory)}
        except OSError:
            return False
        known = {path: file.signature for path, file in self._files.items()}
        return found != known or any(file.young for file in self._files.values())

    def _read(self) -> dict[tuple[Kind, Key], Object] | None:
        """The objects to be; None while the directory cannot be read, so that nothing is pruned for that."""
        try:
            paths = _manifests_in(self.directory)
        except OSError as error:
            self._tell([ManifestError(self.directory, f"cannot be read: {error.strerror}")])
            return None
        errors: list[ManifestError] = []
        self._files = {
            path: file for path in paths if (file := _File.read(path, self._files.get(path), errors))
        }
        result = merged(file.good for file in self._files.values())
        errors += [error for file in self._files.values() for error in file.errors]
        self._tell(errors + result.problems)
        return {(kind_of(item), item.key): item for item in result.objects if kind_of(item) in self._kinds}

    def _tell(self, errors: list[ManifestError]) -> None:
        for error in errors:
            if str(error) not in self._reported:
                self._report(error)
        self._reported = frozenset(map(str, errors))

    def _deliver(self, objects: dict[tuple[Kind, Key], Object], deliver: Callable[[Event], None]) -> None:
        for kind in self._kinds:
            for (of, key), item in objects.items():
                if of == kind and self._delivered.get((kind, key)) != item:
                    deliver(Upsert(kind, item))
        for kind, key in self._delivered.keys() - objects.keys():
            deliver(Remove(kind, key))
        self._delivered = objects
        if not self._listed:
            self._listed = True
            for kind in self._kinds:
                deliver(Synced(kind))


@dataclass(frozen=True, slots=True)
class _File:
    """A file's last version, and the last good one of it."""

    signature: tuple[int, int, int]
    digest: bytes
    good: Parsed
    errors: tuple[ManifestError, ...]
    young: bool

    @staticmethod
    def read(path: Path, known: _File | None, errors: list[ManifestError]) -> _File | None:
        """The file as it is now; None when it is gone or was never readable."""
        try:
            signature = _signature(path)
            if known and signature == known.signature and not known.young:
                return known
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            errors.append(ManifestError(path, f"cannot be read: {error.strerror}"))
            return known
        # Within a tick of the clock a second edit may leave size and time as they are: look once more then.
        young = time.time() - signature[0] / 1e9 < _YOUNG_S
        digest = hashlib.sha256(data).digest()
        if known and digest == known.digest:
            return _File(signature, digest, known.good, known.errors, young)
        new = parse(path, data)
        keeps = known is not None and new.errors and not known.good.errors
        good = known.good if known and keeps else new
        return _File(signature, digest, good, tuple(new.errors), young)


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _log(error: ManifestError) -> None:
    log.error("event=manifest-problem place=%r problem=%r", str(error.place), error.message)


def _files(paths: Iterable[Path], errors: list[ManifestError]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        try:
            found = _manifests_in(path)
        except OSError as error:
            errors.append(ManifestError(path, f"cannot be read: {error.strerror}"))
            continue
        yield from found


def _manifests_in(directory: Path) -> list[Path]:
    """The manifests of a directory by name; hidden files are somebody's half-written ones."""
    return sorted(
        path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")
    )


def _split(path: Path, text: str) -> Iterator[tuple[Place, str]]:
    """The documents with something in them; '---' in the first column always separates, as for kubectl."""
    if path.suffix == ".json":
        yield Place(path, 1, 1), text
        return
    start, number = 0, 0
    for end in [match.start() for match in _SEPARATOR.finditer(text)] + [len(text)]:
        chunk = text[start:end]
        content = _SEPARATOR.sub("   ", chunk, count=1)
        if any(line.strip() and not line.lstrip().startswith("#") for line in content.splitlines()):
            number += 1
            before = text.count("\n", 0, start)
            blank = content[: len(content) - len(content.lstrip())].count("\n")
            yield Place(path, number, 1 + before + blank), "\n" * before + content
        start = end


def _read_document(place: Place, text: str, result: Parsed) -> None:
    try:
        body = _json(text) if place.path.suffix == ".json" else yaml.load(text, _Loader)  # noqa: S506
        _check_plain(body)
    except UnreadableError as error:
        result.errors.append(ManifestError(place, str(error)))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        result.errors.append(ManifestError(place, f"is not YAML: {line}{error.problem or error.context}"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        result.errors.append(ManifestError(place, f"is not YAML: {error}"))
    else:
        _unfold(place, body, result)


class UnreadableError(Exception):
    """A document that is no JSON value of a sane size."""


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not JSON: line {error.lineno}: {error.msg}") from error


def _check_plain(value: object) -> None:
    """Only what JSON can say, of finite size: aliases may nest a document into itself or multiply it."""
    left = _LARGEST
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        left -= 1
        if depth > _DEEPEST or left < 0:
            raise UnreadableError("is nested too deeply or too large")
        if isinstance(part, dict):
            for key in part:
                if not isinstance(key, str):
                    raise UnreadableError(f"the key {shown(key)} is not a string: write it in quotes")
            waiting += [(item, depth + 1) for item in part.values()]
        elif isinstance(part, list):
            waiting += [(item, depth + 1) for item in part]
        elif not isinstance(part, (str, int, float, bool, type(None))):
            raise UnreadableError(f"{shown(part)} is neither text, number, list nor object")


def _unfold(place: Place, body: object, result: Parsed) -> None:
    if not isinstance(body, dict):
        result.errors.append(ManifestError(place, f"{shown(body)} is not a Kubernetes object"))
        return
    kind, version = body.get("kind"), body.get("apiVersion")
    if not isinstance(kind, str) or not kind:
        result.errors.append(ManifestError(place, "kind: is missing"))
    elif not isinstance(version, str) or not version:
        result.errors.append(ManifestError(place, "apiVersion: is missing"))
    elif kind.endswith("List") and isinstance(body.get("items"), list):
        _unfold_items(place, kind, version, body["items"], result)
    else:
        result.documents.append(Document(place, body))


def _unfold_items(place: Place, kind: str, version: str, items: list[object], result: Parsed) -> None:
    for index, item in enumerate(items):
        inside = Place(place.path, place.number, place.line, f"{place.item}, items[{index}]")
        # The items of a NodeList, as the API server answers, do not repeat what they are.
        known = {} if kind == "List" else {"kind": kind.removesuffix("List"), "apiVersion": version}
        _unfold(inside, {**known, **item} if isinstance(item, dict) else item, result)


def _decode(document: Document, result: Parsed) -> None:
    """Decode a document, if it is of a kind that podwall reads."""
    wanted, version = _API_VERSIONS.get(document.kind), document.body["apiVersion"]
    if wanted is None or _group(version) != _group(wanted):
        return
    if version != wanted:
        message = f"apiVersion: {shown(version)} is not served any more: write {wanted}"
        result.errors.append(ManifestError(document.place, message))
        return
    try:
        result.found.append((document.place, decode(cast("AnyKind", document.kind), document.body)))
    except DecodeError as error:
        result.errors.append(ManifestError(document.place, str(error)))


def _add(
    place: Place, item: AnyObject, objects: dict[tuple[AnyKind, Key], AnyObject], result: Manifests
) -> None:
    key = (cast("AnyKind", type(item).__name__), item.key)
    if key in objects:
        message = f"{_titled(*key)} stands in {result.places[key]} already: this one counts"
        result.problems.append(ManifestError(place, message))
    objects[key] = item
    result.places[key] = place
    result.problems += [ManifestError(place, f"{_titled(*key)}: {problem}") for problem in item.problems]


def _group(version: str) -> str:
    return version.rpartition("/")[0]


def _titled(kind: str, key: Key) -> str:
    return f"{kind} {key if isinstance(key, str) else '/'.join(key)}"


def _completed(objects: Mapping[tuple[AnyKind, Key], AnyObject]) -> list[Object]:
    """The objects with the slices of Endpoints, and with the namespaces that nobody wrote down."""
    result: list[Object] = []
    for item in objects.values():
        if not isinstance(item, Endpoints):
            result.append(item)
        elif _is_mirrored(objects.get(("Service", item.key))):
            result.extend(mirrored(item))
    used = dict.fromkeys(item.namespace for item in result if not isinstance(item, (Node, Namespace)))
    missing = [name for name in used if ("Namespace", name) not in objects]
    return [Namespace(name, labels={NAMESPACE_NAME_LABEL: name}) for name in missing] + result


def _is_mirrored(service: AnyObject | None) -> bool:
    """A Service with a selector has slices of its own; without any Service nobody asks for them."""
    return isinstance(service, Service) and not service.selector
