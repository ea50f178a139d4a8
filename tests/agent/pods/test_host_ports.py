"""Ports of the node: which two cannot be had at once, and how they are written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.pods import host_ports
from cni.spec import PortMapping
from tests.agent.pods.world import attachment

OTHER = attachment(pod="web")


def at(host_ip: str = "", port: int = 8080, protocol: str = "tcp") -> PortMapping:
    return PortMapping(port, 80, protocol, host_ip)


TAKEN = {
    "the same": (at(), at(), True),
    "another port": (at(), at(port=8081), False),
    "another protocol": (at(), at(protocol="udp"), False),
    "an address, and every one is taken": (at("10.0.0.1"), at(), True),
    "every one, and an address is taken": (at(), at("10.0.0.1"), True),
    "another address": (at("10.0.0.1"), at("10.0.0.2"), False),
    "the loopback beside the node's address": (at("127.0.0.1"), at("10.0.0.2"), False),
    "all of IPv4, and one is taken": (at("0.0.0.0"), at("10.0.0.2"), True),
    "all of IPv6, and one of IPv4 is taken": (at("::"), at("10.0.0.2"), False),
    "all of each family": (at("::"), at("0.0.0.0"), False),
    "one address in two spellings": (at("fd00::1"), at("fd00:0:0::1"), True),
}


@pytest.mark.parametrize(("new", "old", "taken"), TAKEN.values(), ids=TAKEN.keys())
def test_conflicts(new: PortMapping, old: PortMapping, taken: bool) -> None:
    said = host_ports.conflict([new], [replace(OTHER, port_mappings=(old,))])
    where = new.host_ip or "every address"
    assert said == (f"hostPort 8080/tcp on {where} is taken by Pod default/web on this node" if taken else "")


def test_a_pod_that_wants_one_twice() -> None:
    said = host_ports.conflict([at(port=1), at(), at("10.0.0.1")], [])
    assert said == "hostPort 8080/tcp on 10.0.0.1 is given twice by the Pod itself"


def test_what_is_written_is_read() -> None:
    mappings = (at(), at("10.0.0.1", 53, "udp"), at("fd00::1", 65535, "sctp"))
    text = host_ports.write(mappings)
    assert text == "8080:80/tcp,53:80/udp@10.0.0.1,65535:80/sctp@fd00::1"
    assert host_ports.read(text) == mappings
    assert host_ports.read("") == ()


@pytest.mark.parametrize("text", ["8080", "8080:80/icmp", "8080:80/tcp@", "8080:80/tcp@1.2", "x, y"])
def test_what_others_wrote_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no mapping of a port|does not appear to be"):
        host_ports.read(text)
