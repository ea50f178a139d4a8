"""podwall's own manifests, as they are packaged, with another image or other settings in their text.

    conf/podwall.yaml, conf/uninstall.yaml --wheel--> agent/conf/ --> text --image, settings--> text, objects

They are changed as text, so that the comments that explain the settings reach the cluster.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from agent.config import SETTINGS

INSTALL, UNINSTALL = "podwall.yaml", "uninstall.yaml"
OWN_BY_NODE = frozenset({"node_name"})
"""Settings that are each node's own, from the DaemonSet."""

_IMAGE = re.compile(r"^(\s*image: )podwall:\S+$", re.MULTILINE)
_SETTINGS = re.compile(r"^  config\.yaml: \|\n((?:    .*\n|\n)+)", re.MULTILINE)
_INDENT = "    "


class SettingError(Exception):
    """A setting is unknown or its value is not allowed; the message says which, and what is."""


def packaged(name: str) -> str:
    """The text of a manifest: from the installed package, or of the sources that run."""
    inside = files("agent") / "conf" / name
    if inside.is_file():
        return inside.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "conf" / name).read_text(encoding="utf-8")


def with_image(text: str, image: str) -> str:
    """The manifest with another image for every container; "" changes nothing."""
    return _IMAGE.sub(lambda found: found[1] + image, text) if image else text


def with_settings(text: str, changes: Mapping[str, str]) -> str:
    """The manifest with other settings, their values as YAML. Raises SettingError."""
    found = _SETTINGS.search(text)
    assert found is not None
    settings = re.sub(f"^{_INDENT}", "", found[1], flags=re.MULTILINE)
    settings = changed(settings, changes)
    indented = "".join(f"{_INDENT}{line}\n" if line else "\n" for line in settings.splitlines())
    return text[: found.start(1)] + indented + text[found.end(1) :]


def changed(settings: str, changes: Mapping[str, str]) -> str:
    """A configuration file with other values; the rest of it, comments too, stays. Raises SettingError."""
    for name, value in changes.items():
        _check(name, value)
        line = f"{name}: {value}\n"
        block = re.compile(rf"^{re.escape(name)}:.*\n(?:(?: +|- ).*\n)*", re.MULTILINE)
        if block.search(settings):
            settings = block.sub(lambda _, line=line: line, settings, count=1)  # type: ignore[misc]
        else:
            settings = f"{settings.rstrip()}\n{line}".lstrip()
    return settings


def _check(name: str, value: str) -> None:
    if name not in SETTINGS or name in OWN_BY_NODE:
        known = ", ".join(sorted(SETTINGS.keys() - OWN_BY_NODE))
        raise SettingError(f"unknown setting {name!r}; known are: {known}")
    try:
        SETTINGS[name].metadata["parse"](yaml.safe_load(value))
    except (ValueError, yaml.YAMLError) as error:
        raise SettingError(f"{name} is {value!r}, but must be {error}") from None


def objects(text: str) -> list[dict[str, Any]]:
    """A manifest's objects, in order."""
    return [each for each in yaml.safe_load_all(text) if each]


def restarted_by_settings(daemon_set: dict[str, Any], settings: str) -> None:
    """Let the DaemonSet's Pods be made anew when the settings are others."""
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    metadata = daemon_set["spec"]["template"]["metadata"]
    metadata.setdefault("annotations", {})["podwall.dev/settings"] = digest
