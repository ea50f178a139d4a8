"""Kubernetes objects as plain JSON values, checked as far as the lab itself relies on them.

The agent judges policies, Services and Pods itself, as it would on a real cluster; here is checked what
becomes a file name, a namespace's name, or a decision of the controllers.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

Object = dict[str, Any]
"""One object as the API has it."""

CLUSTER_WIDE = frozenset({"Namespace", "Node"})
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_KIND = re.compile(r"[A-Z][A-Za-z0-9]{0,62}")


class ManifestError(Exception):
    """A manifest cannot be used; the message names file, object and field, and what to do."""


class Key(NamedTuple):
    """What tells one object from another; namespace is empty for cluster-wide kinds."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


def key_of(item: Object) -> Key:
    """Return an object's key; it has been checked."""
    metadata = item["metadata"]
    namespace = "" if item["kind"] in CLUSTER_WIDE else metadata.get("namespace", "default")
    return Key(item["kind"], namespace, metadata["name"])


def check(document: Any, source: str) -> Object:
    """Return a document as an object with its namespace filled in. Raises ManifestError."""
    if not isinstance(document, dict):
        raise ManifestError(f"{source}: a document is not an object with apiVersion, kind and metadata")
    kind = document.get("kind")
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ManifestError(f"{source}: kind is {kind!r}, but must be one such as Pod or NetworkPolicy")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise ManifestError(f"{source}: {kind}: metadata is missing")
    _check_name(kind, metadata, source)
    item = {**document, "metadata": dict(metadata)}
    if kind not in CLUSTER_WIDE:
        item["metadata"].setdefault("namespace", "default")
    for field in ("labels", "annotations"):
        check_strings(metadata.get(field), f"{source}: {key_of(item)}: metadata.{field}")
    return item


def _check_name(kind: str, metadata: Object, source: str) -> None:
    name, namespace = metadata.get("name"), metadata.get("namespace", "default")
    pattern = _LABEL if kind in ("Namespace", "Service") else _SUBDOMAIN
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise ManifestError(
            f"{source}: {kind}: metadata.name is {name!r}, but must be lower case letters, digits and '-'"
        )
    if not isinstance(namespace, str) or not _LABEL.fullmatch(namespace):
        raise ManifestError(f"{source}: {kind} {name}: metadata.namespace is {namespace!r}, which names none")


def check_strings(value: Any, field: str) -> None:
    """Raise ManifestError unless a value is nothing or maps strings to strings."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ManifestError(f"{field} must map names to strings")
    for name, content in value.items():
        if not isinstance(name, str) or not isinstance(content, str):
            raise ManifestError(f"{field}: {name!r}: {content!r} must be a string: put it in quotation marks")


def fail(item: Object, field: str, must: str) -> ManifestError:
    """Return the error that names an object's field."""
    return ManifestError(f"{key_of(item)}: {field}: {must}")


def labels(item: Object) -> dict[str, str]:
    """Return an object's labels."""
    return item.get("metadata", {}).get("labels") or {}


def timestamp() -> str:
    """Return the time now as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def digest(value: Any, length: int) -> str:
    """Return a short name for a value, the same for equal values; of letters that spell no words."""
    alphabet = "bcdfghjklmnpqrstvwxz2456789"
    number = int.from_bytes(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:12], "big")
    letters = []
    for _ in range(length):
        number, letter = divmod(number, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters)
