"""Packets of Services as links carry them: what is translated, what is left behind, and what never passes.

node1   client, near        Services near and far, each with the Pod of its name; both is in front of both
node2   far                 outside: through the nodes' ports
"""

from __future__ import annotations

import errno
import json
import select
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from lab.limits import SLOWNESS
from lab.names import Address
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import pod
from tests.lab.services import (
    FAMILIES,
    LIMIT,
    Asking,
    answers,
    eventually,
    of_version,
    pods_answering,
    pods_of,
    service,
    wait_for_frontends,
)

PODS = ("near", "far")
NODES = ("node1", "node2")
EVIL = b"podwall-evil"

MARKS = """table inet podwalltest {
    chain out {
        type filter hook postrouting priority 300
        counter comment "all"
        meta l4proto { tcp, udp } meta mark != 0 counter comment "packet mark, leaving"
        ct mark != 0 counter comment "connection mark, leaving"
    }
    chain in {
        type filter hook input priority 300
        meta l4proto { tcp, udp } meta mark != 0 counter comment "packet mark, reaching the node"
        ct mark != 0 counter comment "connection mark, reaching the node"
    }
    chain through {
        type filter hook forward priority 300
        meta l4proto { tcp, udp } meta mark != 0 counter comment "packet mark, forwarded"
    }
}"""
"""Counts packets that still bear a mark when they leave a node or reach it, and all packets.

The kernel's own MLD reports seem to bear one: it keeps their spare room in the same place (skb->mark).
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    labels = {"both": "yes"}
    made = [
        pod("default/client", node="node1"),
        pod("default/near", 8080, node="node1", labels={"app": "near", **labels}),
        pod("default/far", 8080, node="node2", labels={"app": "far", **labels}),
        *(service(f"default/{name}", {"app": name}, type="NodePort") for name in PODS),
        service("default/both", labels, type="NodePort", sessionAffinity="ClientIP"),
    ]
    with Lab(nodes=2, given=made) as found:
        every_node_follows(found)
        wait_for_frontends(found, *PODS, "both")
        open_to_all = [
            Asking(source, address, 80)
            for source in ("client", *NODES)
            for name in (*PODS, "both")
            for address in found.service(name).cluster_addresses
        ]
        seen = eventually(lambda: pods_answering(found, open_to_all), lambda seen: {""} not in seen)
        assert {""} not in seen
        yield found


def counted(lab: Lab, node: str) -> dict[str, int]:
    """How many packets of a node there were of each sort, but for those of which there were none."""
    text = lab.run(node, ["nft", "-j", "list", "table", "inet", "podwalltest"]).stdout
    rules = [item["rule"] for item in json.loads(text)["nftables"] if "rule" in item]
    packets = {
        rule["comment"]: each["counter"]["packets"]
        for rule in rules
        for each in rule["expr"]
        if "counter" in each
    }
    return {what: number for what, number in packets.items() if number}


def test_no_mark_is_left_for_others(lab: Lab) -> None:
    """Marks are everybody's: another's policy routing or shaping must not act on ours."""
    for node in NODES:
        assert lab.run(node, ["nft", MARKS]).returncode == 0
    try:
        for version in FAMILIES:
            for name in (*PODS, "both"):
                there = lab.service(name)
                for protocol in ("TCP", "UDP"):
                    number = next(each.node_port for each in there.ports if each.protocol == protocol)
                    ways = [(source, there.address(version), 80) for source in ("client", *NODES)]
                    for node in NODES:
                        own = of_version(lab.node(node).addresses, version)
                        ways += [(source, own, number) for source in ("client", "outside", *NODES)]
                    for source, address, port in ways:
                        assert "" not in pods_of(answers(lab, source, address, port, protocol, times=4))
        for node in NODES:
            found = counted(lab, node)
            assert found.pop("all") > 100
            assert found == {}
    finally:
        for node in NODES:
            lab.run(node, ["nft", "delete", "table", "inet", "podwalltest"])


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("name", PODS)
def test_a_datagram_in_fragments_arrives_whole(lab: Lab, name: str, version: int) -> None:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.socket("client", family, socket.SOCK_DGRAM) as asking:
        asking.settimeout(3 * SLOWNESS)
        asking.connect((str(lab.service(name).address(version)), 80))
        asking.send(b"x" * 6000)
        assert asking.recv(100) == f"default/{name}\n".encode()


def header(packet: Packet) -> Packet:
    return packet[IP] if IP in packet else packet[IPv6]


def is_from(frame: bytes, address: Address) -> bool:
    packet = Ether(frame)
    return (IP in packet or IPv6 in packet) and header(packet).src == str(address)


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("name", PODS)
def test_an_answer_out_of_its_window_does_not_arrive_untranslated(lab: Lab, name: str, version: int) -> None:
    """Connection tracking takes it for invalid and would not translate it back (kubernetes issue 74839)."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    own, there = lab.pod(name).address(version), lab.service(name).address(version)
    with (
        lab.capture("client", incoming_only=True) as client,
        lab.capture(name) as server,
        lab.socket("client", family, socket.SOCK_STREAM) as stream,
    ):
        stream.settimeout(5 * SLOWNESS)
        stream.connect((str(there), 80))
        stream.sendall(b"echo\n")
        port = stream.getsockname()[1]

        def is_answer(frame: bytes) -> bool:
            packet = Ether(frame)
            return is_from(frame, own) and TCP in packet and packet[TCP].dport == port

        stream.sendall(b"first")
        assert stream.recv(100) == b"first"
        frame = server.wait(lambda found: is_answer(found) and b"first" in found)
        assert frame
        stale = Ether(frame)
        stale[TCP].seq = (stale[TCP].seq + (1 << 30)) % (1 << 32)
        stale[TCP].payload = Raw(EVIL)
        for part in (header(stale), stale[TCP]):
            del part.chksum
            for field in ("len", "plen"):
                if field in part.fields:
                    delattr(part, field)
        server.send(bytes(stale))

        stream.sendall(b"second")  # all goes on, and what was sent before has come or never will
        assert stream.recv(100) == b"second"
        heard = [Ether(found).summary() for found in client.frames if is_from(found, own) or EVIL in found]
    assert heard == []


@pytest.mark.parametrize("gone", ["chain any_of_1_ipv", "map endpoints"])
def test_a_first_packet_that_loses_its_way_in_a_commit_is_sent_again(lab: Lab, gone: str) -> None:
    """It met the rules of before the commit and the maps of after it; here that moment is made to last."""
    agent, there = lab.agents["node1"], lab.service("far")
    agent.stop(kill=True)
    try:
        kind, name = gone.split()
        for version in FAMILIES:
            lab.run("node1", ["nft", "flush", kind, "inet", "podwall_services", f"{name}{version}"])
        with (
            lab.capture("node1") as uplink,
            lab.socket("client", socket.AF_INET, socket.SOCK_STREAM) as four,
            lab.socket("client", socket.AF_INET6, socket.SOCK_STREAM) as six,
        ):
            for stream, version in ((four, 4), (six, 6)):
                stream.setblocking(False)
                assert stream.connect_ex((str(there.address(version)), 80)) == errno.EINPROGRESS
            listed = ["nft", "-j", "list", "chain", "inet", "podwall_services", "lost"]
            eventually(lambda: lab.run("node1", listed).stdout, lambda text: '"packets": 2' in text)
            agent.start()
            lab.wait_until_ready()
            for stream in (four, six):
                stream.settimeout(LIMIT)
                ready = select.select([], [stream], [], LIMIT)[1]
                assert ready == [stream]
                stream.sendall(b"name\n")
                assert stream.recv(100) == b"default/far\n"
            untranslated = [frame for frame in uplink.frames if goes_to(frame, there.cluster_addresses)]
        assert untranslated == []
    finally:
        if not agent.alive:
            agent.start()
            lab.wait_until_ready()


def goes_to(frame: bytes, addresses: tuple[Address, ...]) -> bool:
    packet = Ether(frame)
    return (IP in packet or IPv6 in packet) and header(packet).dst in map(str, addresses)


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("name", PODS)
def test_a_source_that_is_not_the_pods_own_reaches_no_service(lab: Lab, name: str, version: int) -> None:
    stranger = "10.244.2.250" if version == 4 else "fd00:10:244:2::250"
    there, link = lab.service(name).address(version), lab.pod("client")
    own_mac = _of(lab, "client", ["ip", "-j", "link", "show", "eth0"], "address")
    gateway = _of(lab, "client", ["ip", "-j", "neigh", "show"], "lladdr")
    layer = IP if version == 4 else IPv6

    def datagram(source: str, content: bytes) -> bytes:
        ip = layer(src=source, dst=str(there))
        return bytes(Ether(src=own_mac, dst=gateway) / ip / UDP(sport=4321, dport=80) / Raw(content))

    with lab.capture("client") as client, lab.capture(name, incoming_only=True) as server:
        client.send(datagram(stranger, EVIL))
        client.send(datagram(str(link.address(version)), b"podwall-good"))
        assert server.wait(lambda frame: b"podwall-good" in frame)
        assert not [frame for frame in server.frames if EVIL in frame]


def _of(lab: Lab, place: str, command: list[str], field: str) -> str:
    text: str = json.loads(lab.run(place, command).stdout)[0][field]
    return text
