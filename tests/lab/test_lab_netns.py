"""Network namespaces by name."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import netns

MakeNetns = Callable[[str], Path]
OWN = Path("/proc/thread-self/ns/net")


def test_a_function_runs_inside_and_its_caller_stays_outside(make_netns: MakeNetns) -> None:
    where = make_netns("one")
    before = netns.identity(OWN)

    inside = netns.run(where, lambda: netns.identity(OWN))

    assert inside == netns.identity(where)
    assert netns.identity(OWN) == before


def test_loopback_is_up_in_both_families(make_netns: MakeNetns) -> None:
    where = make_netns("one")

    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with netns.run(where, socket.socket, family) as listener:
            listener.bind((address, 8080))


def test_a_taken_name_is_refused_and_kept(make_netns: MakeNetns) -> None:
    where = make_netns("one")
    before = netns.identity(where)

    with pytest.raises(FileExistsError):
        make_netns("one")

    assert netns.identity(where) == before


def test_what_a_function_raises_comes_out(make_netns: MakeNetns) -> None:
    with pytest.raises(ZeroDivisionError):
        netns.run(make_netns("one"), lambda: 1 // 0)


def test_ip_netns_sees_it_and_a_removed_one_is_gone(make_netns: MakeNetns) -> None:
    where = make_netns("one")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert where.name in listed

    netns.remove(where.name)
    netns.remove(where.name)

    assert not where.exists()
