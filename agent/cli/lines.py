"""Where the fields that an answer names stand in the files it was asked about: file and line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from agent.explain.fields import Field, line_of

if TYPE_CHECKING:
    from agent.cli.cluster import Places

_ITEM = re.compile(r"items\[(\d+)\]")


@dataclass(slots=True)
class Lines:
    """Looks fields up in the files in which their objects stand."""

    places: Places
    _texts: dict[Path, str] = field(default_factory=dict)

    def of(self, of: Field) -> tuple[Path, int] | None:
        """The file and line of a field; None for an object that stands in no file."""
        place = self.places.get((of.kind, of.key))
        if place is None:
            return None
        inside: list[str | int] = []
        for number in _ITEM.findall(place.item):
            inside += ["items", int(number)]
        try:
            return place.path, line_of(self._text(place.path), place.line, (*inside, *of.path))
        except (OSError, yaml.YAMLError):  # gone since, or JSON that YAML does not read
            return place.path, place.line

    def _text(self, path: Path) -> str:
        if path not in self._texts:
            self._texts[path] = path.read_text(encoding="utf-8", errors="replace")
        return self._texts[path]
