"""A node to attach Pods to: a network namespace in which the test runs, and Pods' namespaces beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.pods.world import Namespace, Namespaces
from tests.linux import command, inside


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        yield made
    finally:
        for namespace in list(made.made):
            made.delete(namespace)


@pytest.fixture
def node(namespaces: Namespaces) -> Iterator[Namespace]:
    """The test, and every thread that it starts, is in this namespace."""
    made = namespaces.new("node")
    command("ip", "-n", made.name, "link", "set", "lo", "up")
    with inside(Path(made.path)):
        yield made


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 512 KiB."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=512k", "podwall-test", str(directory))
    try:
        yield directory
    finally:
        command("umount", "-l", str(directory))
