"""Manifests in files: read what a user wrote, and keep one file per object for the agents to watch.

A directory of one file per object stands for the API server. A file appears, changes and goes as a whole, by
rename.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lab.objects import Key, ManifestError, Object, check, key_of

SUFFIXES = (".yaml", ".yml", ".json")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(paths: Iterable[Path]) -> tuple[Object, ...]:
    """Return the objects in files, and in directories' files (not in directories below), in order.

    Raises ManifestError, naming file, object and field, for the first that cannot be used.
    """
    return tuple(item for path in paths for file in _files(path) for item in _read_file(file))


def parse(text: str, source: str) -> tuple[Object, ...]:
    """Return the objects in a text of YAML documents or JSON; source is what errors call the text."""
    try:
        documents = list(yaml.load_all(text, Loader=_LOADER))
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        raise ManifestError(f"{source}: this is not YAML: {' '.join(str(cause).split())}") from cause
    return tuple(item for document in documents for item in _objects(document, source))


class ObjectDirectory:
    """A directory with a JSON file per object, written as a whole or not at all."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """Use a directory; scratch is another on the same file system, where files are written first."""
        self.path = path
        self._scratch = scratch

    def read(self) -> dict[Key, Object]:
        """Return all objects by key."""
        if not self.path.is_dir():
            return {}
        objects = (json.loads(file.read_bytes()) for file in sorted(self.path.glob("*.json")))
        return {key_of(item): item for item in objects}

    def write(self, item: Object) -> None:
        """Create or replace an object."""
        file = self._file(key_of(item))
        scratch = self._scratch / file.name
        scratch.write_text(json.dumps(item, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, file)  # noqa: PTH105 - says rename(2) more plainly

    def remove(self, key: Key) -> None:
        """Remove an object; gone already is fine."""
        self._file(key).unlink(missing_ok=True)

    def converge(
        self, wanted: Mapping[Key, Object], kinds: Callable[[str], bool], *, remove: bool = True
    ) -> int:
        """Make the objects of some kinds those wanted; return how many files that touched."""
        before = {key: item for key, item in self.read().items() if kinds(key.kind)}
        changed = [item for key, item in wanted.items() if before.get(key) != item]
        for item in changed:
            self.write(item)
        gone = before.keys() - wanted.keys() if remove else set()
        for key in gone:
            self.remove(key)
        return len(changed) + len(gone)

    def _file(self, key: Key) -> Path:
        return self.path / f"{key.kind.lower()}_{key.namespace}_{key.name}.json"


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    found = sorted(
        file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")
    )
    if not found:
        raise ManifestError(f"{path}: holds no {', '.join(SUFFIXES)} file")
    yield from found


def _read_file(file: Path) -> tuple[Object, ...]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ManifestError(f"{file}: cannot be read: {cause}") from cause
    return parse(text, str(file))


def _objects(document: Any, source: str) -> Iterator[Object]:
    if document is None:
        return
    if isinstance(document, dict) and document.get("kind") in ("List", "PodList", "ServiceList"):
        for item in document.get("items") or ():
            yield from _objects(item, source)
        return
    yield check(document, source)
