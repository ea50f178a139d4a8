"""kube-proxy is known by its rules, in each of its modes; they must stay or stay away to change anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.kube_proxy import Choice

ROOT = Path(__file__).parents[2]
LOOK = f"{sys.executable} -c 'from agent import kube_proxy; print(kube_proxy.seen())'"

THERE = {
    "nothing": ("true", ""),
    "nftables": ("nft add table ip kube-proxy", "nftables table ip kube-proxy"),
    "nftables, IPv6": ("nft add table ip6 kube-proxy", "nftables table ip6 kube-proxy"),
    "iptables": ("iptables-nft -t nat -N KUBE-SERVICES", "iptables chain KUBE-SERVICES (IPv4)"),
    "iptables, IPv6": ("ip6tables-nft -t nat -N KUBE-SERVICES", "iptables chain KUBE-SERVICES (IPv6)"),
    "iptables as it was": (
        "iptables-legacy -t nat -N KUBE-SERVICES",
        "iptables-legacy chain KUBE-SERVICES (IPv4)",
    ),
    "iptables as it was, IPv6": (
        "ip6tables-legacy -t nat -N KUBE-SERVICES",
        "iptables-legacy chain KUBE-SERVICES (IPv6)",
    ),
    "two": (
        "nft 'add table ip kube-proxy; add table ip6 kube-proxy'",
        "nftables table ip kube-proxy, nftables table ip6 kube-proxy",
    ),
    "somebody else's": (
        "nft add table inet kube-proxy; iptables-nft -t nat -N DOCKER; iptables-legacy -t nat -N DOCKER; "
        "iptables-nft -t filter -N KUBE-FIREWALL; iptables-nft -t mangle -N KUBE-KUBELET-CANARY",
        "",
    ),
}


@pytest.mark.parametrize(("made", "seen"), THERE.values(), ids=THERE.keys())
def test_rules_of_kube_proxy_are_seen(made: str, seen: str) -> None:
    command = ["unshare", "--net", "sh", "-ec", f"{made}; {LOOK}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == seen


def test_looking_makes_no_table() -> None:
    show = "cat /proc/net/ip_tables_names /proc/net/ip6_tables_names; nft list tables"
    command = ["unshare", "--net", "sh", "-ec", f"{LOOK}; {show}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


LOOKS = {
    "none at the start": ("-", "1"),
    "there at the start": ("x", "0"),
    "it comes later": ("--xx", "1110"),
    "it comes and goes": ("-x-x-", "11111"),
    "it goes": ("x---x", "00011"),
    "it is away for a moment": ("x--x--x", "0000000"),
}


@pytest.mark.parametrize(("looks", "serving"), LOOKS.values(), ids=LOOKS.keys())
def test_who_serves(looks: str, serving: str) -> None:
    choice = Choice()
    told, before = "", None
    for look in looks:
        changed = choice.look("its table" if look == "x" else "")
        assert changed is (choice.serve is not before)
        before = choice.serve
        told += "1" if choice.serve else "0"
    assert told == serving
