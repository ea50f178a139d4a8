"""What a node says of itself: its own kernel and files, read as they are."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.config import Config
from agent.doctor import NEEDS, Known, facts, not_allowed
from cni import wire
from lab import netns

NAME = "podwall-tdoctor"
RANGES = (ip_network("10.244.1.0/24"),)
MANIFEST = Path(__file__).parents[2] / "conf" / "podwall.yaml"


@pytest.fixture
def node() -> Iterator[Path]:
    """A machine with an address and a default route."""
    netns.create(NAME)
    try:
        script = (
            "ip link add eth0 type veth peer eth9; ip link set eth0 up mtu 1400; ip link set eth9 up;"
            "ip addr add 172.31.0.2/24 dev eth0; ip route add default via 172.31.0.1;"
            "sysctl -qw net.ipv4.ip_forward=0"
        )
        inside("sh", "-ec", script)
        yield netns.path(NAME)
    finally:
        netns.remove(NAME)


def inside(*words: str, data: str = "") -> None:
    netns.run(netns.path(NAME), subprocess.run, words, input=data, text=True, check=True)


def look(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    config = Config(node_name="here", cluster=f"manifests:{tmp_path}", cni_conf_dir=tmp_path, **settings)
    return netns.run(netns.path(NAME), facts, Known(config, pod_cidrs=RANGES))


def test_a_machine_that_podwall_never_touched(node: Path, tmp_path: Path) -> None:
    (tmp_path / "10-other.conf").write_text("{}")
    found = look(tmp_path)

    assert found["unread"] == {}
    assert found["cni"]["files"] == ["10-other.conf"]
    assert found["links"]["uplink"] == {"name": "eth0", "mtu": 1400}
    assert [each["path"] for each in found["sysctls"]][:1] == ["net/ipv4/ip_forward"]
    assert found["conntrack"]["most"] > 0
    assert found["api"] is None
    assert [each for each in found["features"] if each["matters"]] == []


def test_the_answer_fits_into_a_message_whatever_is_on_the_node(node: Path, tmp_path: Path) -> None:
    chains = "".join(
        f"chain c{n} {{ type filter hook forward priority {n}; policy drop; }}\n" for n in range(300)
    )
    inside("nft", "-f", "-", data=f"table inet others {{\n{chains}}}\n")
    found = look(tmp_path)
    assert len(found["filters"]["drops"]) == 100
    assert len(json.dumps(found)) < wire.LIMIT


def test_what_cannot_be_read_is_named(node: Path, tmp_path: Path) -> None:
    inside("ip", "route", "del", "default")
    found = look(tmp_path, sysctl_dir=tmp_path / "none")
    assert {"conntrack", "links", "sysctls"} <= set(found["unread"])
    assert "InternalIP" in found["unread"]["links"]


def role_rules() -> list[dict[str, Any]]:
    documents = [each for each in yaml.safe_load_all(MANIFEST.read_text()) if each]
    return [rule for each in documents if each["kind"] in ("ClusterRole", "Role") for rule in each["rules"]]


def test_the_manifest_gives_what_is_needed() -> None:
    assert not_allowed(role_rules()) == []


def test_each_right_that_is_taken_away_is_missed() -> None:
    rules = role_rules()
    for number, rule in enumerate(rules):
        rest = rules[:number] + rules[number + 1 :]
        missed = not_allowed(rest)
        assert missed, rule
        assert all(any(verb in each for verb in rule["verbs"]) for each in missed)


def test_an_administrator_lacks_nothing() -> None:
    assert not_allowed([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]) == []
    assert len(not_allowed([])) == sum(len(need.verbs) for need in NEEDS)


def test_rules_of_iptables_are_seen_and_the_older_ones_named(node: Path, tmp_path: Path) -> None:
    inside("iptables-nft", "-P", "FORWARD", "DROP")
    inside("iptables-nft", "-A", "FORWARD", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
    inside("ip6tables-legacy", "-P", "FORWARD", "DROP")
    filters = look(tmp_path)["filters"]
    assert [(each["table"], each["chain"], each["how"]) for each in filters["drops"]] == [
        ("filter", "FORWARD", "policy drop")
    ]
    assert filters["legacy"] == ["ip6tables-legacy"]

    inside("iptables-nft", "-I", "FORWARD", "-s", "10.244.0.0/16", "-j", "ACCEPT")
    assert look(tmp_path)["filters"]["drops"] == []
    inside("iptables-nft", "-I", "FORWARD", "-i", "podwall+", "-j", "REJECT")
    assert [each["how"] for each in look(tmp_path)["filters"]["drops"]] == ["a rule"]
