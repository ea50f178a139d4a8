"""Manifests as text become documents, and documents of the kinds that podwall reads become objects.

    file --split at '---'--> documents --List unfolded--> decode --> objects

A document that cannot be read is named by file, number and line, and the others go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from .decode import AnyKind, AnyObject, DecodeError, decode
from .values import shown

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

    @property
    def group(self) -> str:
        """Its API group; empty for the core one."""
        return _group(self.body["apiVersion"])

    @property
    def is_read(self) -> bool:
        """Whether podwall reads it: a namesake of another API group is something else."""
        wanted = _API_VERSIONS.get(self.kind)
        return wanted is not None and self.group == _group(wanted)


@dataclass(slots=True)
class Parsed:
    """What one file says; `documents` has the kinds that podwall does not read itself, too."""

    documents: list[Document] = field(default_factory=list)
    found: list[tuple[Place, AnyObject]] = field(default_factory=list)
    errors: list[ManifestError] = field(default_factory=list)


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
    if not document.is_read:
        return
    wanted, version = _API_VERSIONS[document.kind], document.body["apiVersion"]
    if version != wanted:
        message = f"apiVersion: {shown(version)} is not served any more: write {wanted}"
        result.errors.append(ManifestError(document.place, message))
        return
    try:
        result.found.append((document.place, decode(cast("AnyKind", document.kind), document.body)))
    except DecodeError as error:
        result.errors.append(ManifestError(document.place, str(error)))


def _group(version: str) -> str:
    return version.rpartition("/")[0]
