"""Ordinary manifests as a source of events: the cluster for the lab, and for commands without a cluster.

    files --split at '---'--> documents --List unfolded--> decode --Endpoints become EndpointSlices--> objects

A document that cannot be read is named by file, number and line, and the others go on.  `ManifestSource`
keeps the last version of a file in which everything could be read: half of an edit must not open what the
rest of it closed.  Every namespace that something lives in exists, labelled as the API server would.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec

from .decode import AnyKind, AnyObject
from .documents import Document, ManifestError, Parsed, Place, parse
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
    titled,
)

SUFFIXES = (".yaml", ".yml", ".json")
POLL_S = 0.05

_YOUNG_S = 0.1

log = logging.getLogger(__name__)


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

    `statuses` is a directory in which agents say what the status of a Service is, as a Service with the same
    uid and nothing but its status: it counts for status.loadBalancer instead of what the manifest says.
    `report` gets each error once, when it appears; without it they are logged.
    """

    def __init__(
        self,
        directory: Path,
        kinds: Iterable[Kind] = KINDS,
        report: Callable[[ManifestError], None] | None = None,
        poll_s: float = POLL_S,
        statuses: Path | None = None,
    ) -> None:
        self.directory = directory
        self._statuses = statuses
        self._kinds = tuple(kinds)
        self._report = report or _log
        self._poll_s = poll_s
        self._files: dict[Path, _File] = {}
        self._delivered: dict[tuple[Kind, Key], Object] = {}
        self._reported: frozenset[str] = frozenset()
        self._listed = False
        self._looking = asyncio.Lock()

    async def run(self, deliver: Callable[[Event], None]) -> None:
        """Deliver what is there, Synced, and then each change, until cancelled."""
        while True:
            await self.look(deliver)
            await asyncio.sleep(self._poll_s)

    async def look(self, deliver: Callable[[Event], None]) -> None:
        """Deliver everything that was written before now and has not been delivered."""
        async with self._looking:
            if self._looks_changed() or not self._listed:
                objects = await asyncio.to_thread(self._read)
                if objects is not None:
                    self._deliver(objects, deliver)

    def get(self, kind: Kind, key: Key) -> Object | None:
        """An object as it was delivered last; None when there is none."""
        return self._delivered.get((kind, key))

    def _looks_changed(self) -> bool:
        try:
            found = {path: _signature(path) for path in self._paths()}
        except OSError:
            return False
        known = {path: file.signature for path, file in self._files.items()}
        return found != known or any(file.young for file in self._files.values())

    def _read(self) -> dict[tuple[Kind, Key], Object] | None:
        """The objects to be; None while the directory cannot be read, so that nothing is pruned for that."""
        try:
            paths = self._paths()
        except OSError as error:
            self._tell([ManifestError(self.directory, f"cannot be read: {error.strerror}")])
            return None
        errors: list[ManifestError] = []
        self._files = {
            path: file for path in paths if (file := _File.read(path, self._files.get(path), errors))
        }
        result = merged(file.good for path, file in self._files.items() if path.parent == self.directory)
        errors += [error for file in self._files.values() for error in file.errors]
        self._tell(errors + result.problems)
        objects = {(kind_of(item), item.key): item for item in result.objects if kind_of(item) in self._kinds}
        self._put_statuses(objects)
        return objects

    def _paths(self) -> list[Path]:
        """The files that count. Raises OSError."""
        statuses = self._statuses
        found = _manifests_in(statuses) if statuses and statuses.is_dir() else []
        return _manifests_in(self.directory) + found

    def _put_statuses(self, objects: dict[tuple[Kind, Key], Object]) -> None:
        files = (file for path, file in self._files.items() if path.parent == self._statuses)
        written = [item for file in files for _, item in file.good.found]
        objects |= {(kind_of(item), item.key): item for item in with_statuses(objects.values(), written)}

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


def with_statuses(objects: Iterable[Object], written: Iterable[AnyObject]) -> list[Object]:
    """The objects, Services with the status that was written for them apart, where their uid is the same."""
    services = {(item.key, item.uid): item for item in written if isinstance(item, Service)}
    return [
        msgspec.structs.replace(item, load_balancer=status.load_balancer)
        if isinstance(item, Service) and (status := services.get((item.key, item.uid)))
        else item
        for item in objects
    ]


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


def _add(
    place: Place, item: AnyObject, objects: dict[tuple[AnyKind, Key], AnyObject], result: Manifests
) -> None:
    key = (cast("AnyKind", type(item).__name__), item.key)
    if key in objects:
        message = f"{titled(*key)} stands in {result.places[key]} already: this one counts"
        result.problems.append(ManifestError(place, message))
    objects[key] = item
    result.places[key] = place
    result.problems += [ManifestError(place, f"{titled(*key)}: {problem}") for problem in item.problems]


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
