"""What of a lab is on this machine: its settings, its lock, and what there is to remove."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab import netns, processes
from lab.names import LAB, MAX_NODES, RUN
from lab.processes import LabError

MODES = ("auto", "direct", "vxlan")

_SETTINGS = RUN / "lab.json"
_LOCK = f"\0{LAB}"
_LOCK_LIMIT = 60.0
_LOCK_POLL = 0.05


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes one lab unlike another; complete once it is up. Raises LabError for what cannot be."""

    nodes: int = 2
    mode: str = "auto"
    routed: bool = False
    flags: Mapping[str, str] = field(default_factory=dict)
    plugin: tuple[str, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise LabError(f"the number of nodes is {self.nodes}, but must be 1 to {MAX_NODES}")
        if self.mode not in MODES:
            raise LabError(f"the mode is {self.mode!r}, but must be one of {', '.join(MODES)}")

    def alike(self, other: Settings) -> bool:
        """Whether a user asked for the same."""
        return (self.nodes, self.mode, self.routed) == (other.nodes, other.mode, other.routed)


def read_settings() -> Settings | None:
    """Return the settings of the lab that is there, whole or not; None when there is none."""
    try:
        content = json.loads(_SETTINGS.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return Settings(**{**content, "plugin": tuple(content["plugin"])})


def write_settings(settings: Settings) -> None:
    """Keep the settings."""
    scratch = _SETTINGS.with_suffix(".new")
    scratch.write_text(json.dumps(dataclasses.asdict(settings)) + "\n", encoding="utf-8")
    scratch.replace(_SETTINGS)


def remains() -> bool:
    """Whether anything of a lab is there: files or namespaces."""
    return RUN.exists() or any(True for _ in netns.names(f"{LAB}-"))


def namespaces() -> list[Path]:
    """Return the namespaces of a lab."""
    return [netns.path(name) for name in netns.names(f"{LAB}-")]


def remove_namespaces(names: Sequence[str]) -> None:
    """End what runs in these namespaces, and remove them with their links."""
    processes.stop_in([netns.path(name) for name in names])
    for name in names:
        netns.remove(name)


def remove() -> None:
    """Remove everything of a lab: processes, then namespaces with their links, then files."""
    remove_namespaces(tuple(netns.names(f"{LAB}-")))
    shutil.rmtree(RUN, ignore_errors=True)
    if RUN.exists():
        raise LabError(f"{RUN} cannot be removed; somebody writes into it")


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Let one process at a time work on the lab. The lock is a socket's name and goes with its process."""
    with socket.socket(socket.AF_UNIX) as held:
        deadline = time.monotonic() + _LOCK_LIMIT
        while True:
            try:
                held.bind(_LOCK)
                break
            except OSError:
                if time.monotonic() > deadline:
                    text = f"another command has been working on the lab for {_LOCK_LIMIT:.0f} s"
                    raise LabError(text) from None
            time.sleep(_LOCK_POLL)
        yield
