"""Uninstalling on a node: everything of podwall goes, nothing else does, and it looks again at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.uninstall import LeftError, look_again
from lab import netns

NAME = "podwall-tuninst"
SCRIPT = """
ip link add podwall1234abcd type veth peer other0
ip link set podwall1234abcd up; ip link set other0 up
ip route add 10.244.9.0/24 dev podwall1234abcd proto 112
ip route add unreachable 10.244.8.0/24 proto 112
ip -6 route add fd00:9::/64 dev podwall1234abcd proto 112
ip route add 10.99.0.0/16 dev lo
nft add table inet podwall; nft add table inet podwall_services; nft add table arp podwall
nft add table inet others
"""
FILES = (
    "etc/cni/net.d/10-podwall.conflist",
    "etc/cni/net.d/.10-podwall.conflist.x.tmp",
    "opt/cni/bin/podwall",
    "var/lib/podwall/ledger.sqlite3",
    "run/podwall/x",
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A node's files, and its namespace with everything that podwall makes in one."""
    netns.create(NAME)
    try:
        for name in (*FILES, "etc/cni/net.d/99-other.conf"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        netns.run(netns.path(NAME), subprocess.run, ["sh", "-ec", SCRIPT], check=True)
        yield tmp_path
    finally:
        netns.remove(NAME)


def inside(*words: str) -> subprocess.CompletedProcess[str]:
    return netns.run(netns.path(NAME), subprocess.run, words, capture_output=True, text=True, check=False)


def test_everything_goes_and_it_says_so(node: Path) -> None:
    done = inside(sys.executable, "-m", "agent.uninstall", "--root", str(node))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "nothing of podwall is left"
    assert "removed link podwall1234abcd" in said
    assert "removed table inet podwall" in said
    assert any(line.endswith("10-podwall.conflist") for line in said)

    assert "10.99.0.0/16" in inside("ip", "route").stdout
    assert "other0" not in inside("ip", "link").stdout  # its peer was podwall's
    assert inside("nft", "list", "tables").stdout == "table inet others\n"
    assert [path.name for path in (node / "etc/cni/net.d").iterdir()] == ["99-other.conf"]
    assert netns.run(netns.path(NAME), lambda: list(look_again(node))) == []


def test_what_is_there_is_named(node: Path) -> None:
    with pytest.raises(LeftError) as left:
        netns.run(netns.path(NAME), lambda: list(look_again(node)))
    for part in ("10-podwall.conflist", "podwall1234abcd", "10.244.9.0/24", "10.244.8.0/24", "fd00:9::/64"):
        assert part in str(left.value)
    for table in ("inet podwall", "inet podwall_services", "arp podwall"):
        assert f"table {table}" in str(left.value)
    assert "others" not in str(left.value)


def test_nothing_was_ever_there(tmp_path: Path) -> None:
    netns.create(NAME)
    try:
        done = inside(sys.executable, "-m", "agent.uninstall", "--root", str(tmp_path))
    finally:
        netns.remove(NAME)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "nothing of podwall is left")
