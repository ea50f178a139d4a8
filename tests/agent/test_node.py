"""The node's settings and the runtime's file: what is asked for, what is said when it cannot be had."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent import node
from agent.routes.plan import Mode
from lab import netns

READY = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/default/forwarding": "1",
    "net/ipv4/conf/eth0/forwarding": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/eth0/rp_filter": "0",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/eth0/accept_ra": "1",
}
STRICT = {"net/ipv4/conf/all/rp_filter": "1"}
NO_IPV6 = {path: value for path, value in READY.items() if "ipv6" not in path}

NEEDED: dict[str, tuple[Mode, tuple[int, ...], dict[str, str], list[str]]] = {
    "ready": ("auto", (4, 6), READY, []),
    "ready, and router advertisements are the operator's business": ("auto", (6,), READY, []),
    "a fresh machine": (
        "direct",
        (4, 6),
        READY | {"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "0"},
        [
            "sysctl -w net.ipv4.ip_forward=1",
            "sysctl -w net.ipv6.conf.eth0.accept_ra=2",
            "sysctl -w net.ipv6.conf.all.forwarding=1",
        ],
    ),
    "advertisements are not listened to": (
        "direct",
        (6,),
        READY | {"net/ipv6/conf/all/forwarding": "0", "net/ipv6/conf/eth0/accept_ra": "0"},
        ["sysctl -w net.ipv6.conf.all.forwarding=1"],
    ),
    "forwarding is off for links to come and for the uplink": (
        "direct",
        (4,),
        READY | {"net/ipv4/conf/default/forwarding": "0", "net/ipv4/conf/eth0/forwarding": "0"},
        ["sysctl -w net.ipv4.conf.default.forwarding=1", "sysctl -w net.ipv4.conf.eth0.forwarding=1"],
    ),
    "IPv6 alone leaves IPv4": ("auto", (6,), READY | STRICT | {"net/ipv4/ip_forward": "0"}, []),
    "strict, direct": ("direct", (4,), READY | STRICT, []),
    "strict, with tunnels": ("auto", (4,), READY | STRICT, ["sysctl -w net.ipv4.conf.eth0.rp_filter=2"]),
    "strict on the uplink alone": (
        "vxlan",
        (4,),
        READY | {"net/ipv4/conf/eth0/rp_filter": "1"},
        ["sysctl -w net.ipv4.conf.eth0.rp_filter=2"],
    ),
    "loose already": ("vxlan", (4,), READY | STRICT | {"net/ipv4/conf/eth0/rp_filter": "2"}, []),
    "no IPv6 in the kernel": ("auto", (4, 6), NO_IPV6, ["sysctl -w net.ipv6.conf.all.forwarding=1"]),
}


@pytest.mark.parametrize(("mode", "families", "current", "expected"), NEEDED.values(), ids=NEEDED.keys())
def test_settings_needed(
    mode: Mode, families: tuple[int, ...], current: dict[str, str], expected: list[str]
) -> None:
    assert [sysctl.command for sysctl in node.missing("eth0", mode, families, current)] == expected


def test_an_interface_with_a_dot_in_its_name() -> None:
    current = {path.replace("eth0", "bond0.100"): value for path, value in READY.items()}
    current["net/ipv4/conf/bond0.100/forwarding"] = "0"
    (needed,) = node.missing("bond0.100", "direct", [4], current)
    assert needed.command == "sysctl -w net/ipv4/conf/bond0.100/forwarding=1"


def a_root(folder: Path, values: dict[str, str]) -> Path:
    for name, value in values.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")
    return folder


def test_what_cannot_be_set_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = a_root(tmp_path, NO_IPV6 | {"net/ipv4/ip_forward": "0"})

    def refuse(path: Path, _: str) -> int:
        raise OSError(errno.EROFS if path.exists() else errno.ENOENT, "no")

    monkeypatch.setattr(Path, "write_text", refuse)
    done, problems = node.settle("eth0", "direct", (4, 6), root)
    assert done == ()
    assert [str(problem) for problem in problems] == [
        "net.ipv4.ip_forward is 0 and must be 1 (Pods' packets are routed): /proc/sys is mounted read-only; "
        "run sysctl -w net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding must be 1 (Pods' IPv6 packets are routed), but this kernel has no "
        "IPv6: start it without ipv6.disable=1",
    ]


@pytest.fixture
def fresh_namespace() -> Iterator[ThreadPoolExecutor]:
    """A thread in a network namespace of its own."""
    name = f"podwall-node{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)

    try:
        subprocess.run(
            ["ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"], check=True
        )
        with ThreadPoolExecutor(1, initializer=netns.enter, initargs=(netns.path(name),)) as thread:
            yield thread
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_settings_in_a_real_kernel(fresh_namespace: ThreadPoolExecutor) -> None:
    def story() -> None:
        for path in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            Path("/proc/sys", path).write_text("0")
        Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("1")
        done, problems = node.settle("eth0", "auto", (4, 6))
        assert problems == ()
        assert [sysctl.name for sysctl in done] == [
            "net.ipv4.ip_forward",
            "net.ipv4.conf.eth0.rp_filter",
            "net.ipv6.conf.eth0.accept_ra",
            "net.ipv6.conf.all.forwarding",
        ]
        assert node.settle("eth0", "auto", (4, 6)) == ((), ())

    fresh_namespace.submit(story).result()


def test_the_conflist_speaks_to_old_and_new_runtimes() -> None:
    document = json.loads(node.conflist(Path("/run/podwall/agent.sock")))
    assert document["cniVersion"] == "1.0.0"
    assert max(document["cniVersions"]) == "1.1.0"
    assert document["name"] == "podwall"
    assert document["plugins"] == [
        {
            "type": "podwall",
            "socket": "/run/podwall/agent.sock",
            "capabilities": {"bandwidth": True, "portMappings": True},
        }
    ]


def test_the_conflist_comes_whole(tmp_path: Path) -> None:
    folder = tmp_path / "net.d"
    assert node.write_conflist(folder, Path("/a.sock"))
    assert not node.write_conflist(folder, Path("/a.sock")), "the same is not written again"
    assert node.write_conflist(folder, Path("/b.sock"))
    assert [path.name for path in folder.iterdir()] == ["10-podwall.conflist"]
    assert (folder / node.CONFLIST).read_bytes() == node.conflist(Path("/b.sock"))
    assert (folder / node.CONFLIST).stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node.write_conflist(tmp_path, Path("/a.sock"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        node.write_conflist(tmp_path, Path("/b.sock"))
    assert [path.name for path in tmp_path.iterdir()] == [node.CONFLIST]
    assert b"/a.sock" in (tmp_path / node.CONFLIST).read_bytes()
