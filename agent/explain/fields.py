"""The field of an object that decides something, as one finds it again in YAML. Pure.

Field("NetworkPolicy", "shop", "web", ("spec", "ingress", 0))  -->  "NetworkPolicy shop/web spec.ingress[0]"
that, the text of a file, the first line of its document       -->  the line in the file
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import yaml

from agent.cluster.model import Kind

Path: TypeAlias = tuple[str | int, ...]


class Field(NamedTuple):
    """A field of an object; the namespace of a Node is ""."""

    kind: Kind
    namespace: str
    name: str
    path: Path

    @property
    def key(self) -> str | tuple[str, str]:
        """The key of its object."""
        return (self.namespace, self.name) if self.namespace else self.name

    @property
    def object(self) -> str:
        """Its object, as kubectl writes one."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    @property
    def text(self) -> str:
        """The path as kubectl writes it."""
        return written(self.path)


def written(path: Iterable[str | int]) -> str:
    """A path as kubectl writes it: spec.ingress[0].from."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


def parsed(text: str) -> Path:
    """The path that is written so."""
    words = text.replace("[", ".[").split(".")
    return tuple(int(word[1:-1]) if word.startswith("[") else word for word in words)


def line_of(text: str, first_line: int, path: Path) -> int:
    """The line, from 1, of a field in the document that begins at `first_line` of a text.

    What is not written there is where the last part of its path is that is.
    """
    node = _document(text, first_line)
    line = first_line
    for part in path:
        found = _child(node, part)
        if found is None:
            break
        line, node = found
    return line


def _document(text: str, first_line: int) -> yaml.Node | None:
    """The document that begins at this line, which may be a comment before it."""
    for node in yaml.compose_all(text, yaml.CSafeLoader):
        if node is not None and node.start_mark.line + 1 >= first_line:
            return node
    return None


def _child(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode) and isinstance(part, str):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item.start_mark.line + 1, item
    return None
