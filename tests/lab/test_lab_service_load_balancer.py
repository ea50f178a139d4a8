"""The example's LoadBalancer Services: who reaches them, and how they go on after the death of a node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA
from scapy.layers.l2 import ARP, Ether

from lab import names
from lab.limits import SLOWNESS
from lab.names import Address
from lab.world import Lab
from tests.lab.load import Load, Try
from tests.lab.services import FAMILIES, Asking, eventually, example, named, of_version, pods_answering

NODES = ("node1", "node2", "node3")
TAKE_OVER_S = 5.0 * SLOWNESS
"""So soon the address answers again after the death of the node that announced it."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(nodes=3, given=example("client", "load-balancer")) as made:
        wanted = [
            Asking(source, address, 80)
            for address in addresses(made, "balanced")
            for source in ("outside", "client", *NODES)
        ]
        wanted += [
            Asking("outside", address, 80, of_version(names.BEHIND_OUTSIDE, address.version))
            for address in addresses(made, "balanced-for-some")
        ]
        seen = eventually(lambda: pods_answering(made, wanted), lambda seen: {""} not in seen)
        assert {""} not in seen
        yield made


def addresses(lab: Lab, name: str) -> tuple[Address, ...]:
    """A Service's load balancer addresses, once it has them."""
    found = eventually(lambda: lab.service(name).balanced_addresses, lambda found: len(found) == 2)
    assert {address.version for address in found} == {4, 6}
    return found


def test_the_address_is_reached_from_everywhere(lab: Lab) -> None:
    everybody = named(lab, "default/balanced-")
    asked = [
        Asking(source, address, 80)
        for address in addresses(lab, "balanced")
        for source in ("outside", "client", *NODES)
    ]

    assert pods_answering(lab, asked, times=20) == [everybody] * len(asked)


def test_source_ranges_admit_whom_they_name(lab: Lab) -> None:
    everybody = named(lab, "default/balanced-")
    expected = {}
    for address in addresses(lab, "balanced-for-some"):
        version = address.version
        expected[Asking("outside", address, 80, of_version(names.BEHIND_OUTSIDE, version))] = everybody
        expected[Asking("outside", address, 80)] = {""}
        expected[Asking("client", address, 80)] = {""}
        # The ranges are those of the load balancer's address, and of no other way to the Service.
        expected[Asking("client", lab.service("balanced-for-some").address(version), 80)] = everybody

    def seen() -> dict[Asking, set[str]]:
        return dict(zip(expected, pods_answering(lab, list(expected), times=20), strict=True))

    assert eventually(seen, expected.__eq__) == expected


def announcers(frames: tuple[bytes, ...], address: Address) -> list[str]:
    """The MACs that said that they have an address, each once in a row, in order."""
    said = []
    for frame in frames:
        packet = Ether(frame)
        if ARP in packet and packet[ARP].psrc == str(address):
            said.append(packet[ARP].hwsrc)
        elif ICMPv6ND_NA in packet and packet[ICMPv6ND_NA].tgt == str(address):
            said.append(packet.src)
    return [mac for at, mac in enumerate(said) if not at or said[at - 1] != mac]


def node_of(lab: Lab, mac: str) -> str:
    """The node whose link has this MAC."""
    [found] = [node for node in NODES if mac in lab.run(node, ["ip", "link", "show", "eth0"]).stdout]
    return found


@pytest.mark.parametrize("version", FAMILIES)
def test_the_address_answers_again_after_the_death_of_its_node(
    lab: Lab, version: int, record_property: Callable[[str, object], None]
) -> None:
    """Seen by a client that goes on asking, and on the link: no two nodes ever say that it is theirs."""
    address = of_version(addresses(lab, "balanced"), version)
    with lab.capture("outside", incoming_only=True) as heard:
        lab.run("outside", ["ip", "neigh", "flush", "dev", "eth0"])
        with Load(lab.netns("outside"), address, 80, patience=0.2) as load:
            load.wait_for(20)
            [first] = announcers(heard.frames, address)
            dying = node_of(lab, first)
            lab.agents[dying].stop(kill=True)
            lab.unplug(dying)
            died = time.monotonic()
            again = eventually(lambda: answered_since(load, died + 0.2), bool, 2 * TAKE_OVER_S)
            load.wait_for(10, 30 * SLOWNESS)
        said = announcers(heard.frames, address)

    assert again
    seconds = again[0].ended - died
    record_property("answers_again_s", round(seconds, 2))
    print(f"{address} answered again {seconds:.2f} s after the death of {dying}")
    assert seconds < TAKE_OVER_S
    assert said[0] == first
    assert len(said) == 2, "from one node to another, once"


def answered_since(load: Load, moment: float) -> list[Try]:
    return [each for each in load.tries if each.began > moment and each.pod]
