"""A node to attach Pods to: a network namespace in which the test runs, and Pods' namespaces beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.pods.world import Namespace, Namespaces, enter, run


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
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    made = namespaces.new("node")
    run("ip", "-n", made.name, "link", "set", "lo", "up")
    enter(made.path)
    try:
        yield made
    finally:
        enter(f"/proc/self/fd/{home}")
        os.close(home)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 512 KiB."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=512k", "podwall-test", str(directory))
    try:
        yield directory
    finally:
        run("umount", "-l", str(directory))
