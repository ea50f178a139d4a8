"""A node that forwards between two sides, for tests of what conntrack says of real flows.

left 10.7.1.2, fd07:1::2  --  node  --  right 10.7.2.2, fd07:2::2
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from lab import netns
from lab.limits import SLOWNESS
from tests.linux import command, inside

T = TypeVar("T")
LIMIT_S = 5.0 * SLOWNESS
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
PLACES = ("node", "left", "right")


class Sides:
    """The three namespaces, under names of a test's own."""

    def __init__(self) -> None:
        self.prefix = f"podwallsides{os.getpid()}"

    def where(self, place: str) -> Path:
        return netns.path(f"{self.prefix}-{place}")

    def run(self, place: str, *words: str, data: str = "") -> None:
        command("ip", "netns", "exec", f"{self.prefix}-{place}", *words, data=data)

    def inside(self, place: str, work: Callable[[], T]) -> T:
        return netns.run(self.where(place), work)

    def open(self, place: str, version: int, kind: int, protocol: int = 0) -> socket.socket:
        made = self.inside(place, lambda: socket.socket(FAMILY[version], kind, protocol))
        made.settimeout(LIMIT_S)
        return made

    def build(self) -> None:
        for place in PLACES:
            netns.create(f"{self.prefix}-{place}")
            self.run(place, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        for number, place in enumerate(("left", "right"), 1):
            lines = f"""link add {place} type veth peer name eth0 netns {self.prefix}-{place}
                link set {place} up
                addr add 10.7.{number}.1/24 dev {place}
                addr add fd07:{number}::1/64 dev {place} nodad"""
            self.run("node", "ip", "-batch", "-", data=lines)
            lines = f"""link set eth0 up
                addr add 10.7.{number}.2/24 dev eth0
                addr add fd07:{number}::2/64 dev eth0 nodad
                route add default via 10.7.{number}.1
                route add default via fd07:{number}::1"""
            self.run(place, "ip", "-batch", "-", data=lines)
        self.run("node", "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def remove(self) -> None:
        for place in PLACES:
            netns.remove(f"{self.prefix}-{place}")


S = TypeVar("S", bound=Sides)


@contextmanager
def entered(sides: S) -> Iterator[S]:
    """The sides, built; the node's namespace is the test's own until the end."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        sides.build()
        with inside(sides.where("node")):
            yield sides
    finally:
        sides.remove()
