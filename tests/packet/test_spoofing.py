"""What a Pod sends and may not send arrives nowhere; what it may send, sent the same way, arrives.

Each case is a list of frames that go out of the attacker's eth0 as they are. After them, out of the same
socket, goes a legitimate packet to every other place. Links deliver in order, so when those have arrived
everything before them has, or never will: then each capture must hold those legitimate packets and nothing
else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP, IPOption_LSRR, IPOption_Router_Alert, IPOption_RR, fragment
from scapy.layers.inet6 import (
    ICMPv6MLDMultAddrRec,
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, LLC, STP, Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from agent.routes.plan import vtep_mac
from lab.limits import SLOWNESS

World = Any  # tests/packet/conftest.py
Frames = list[Packet]
NewWorld = Callable[[str], contextlib.AbstractContextManager[World]]

PORT = 4444
EVIL, GOOD = b"podwall-evil", b"podwall-good"
NODES = ("node1", "node2")
PEER = {"node1": "node2", "node2": "node1"}
BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "ff02::1"


def ether(world: World, to: str = "", kind: int | None = None) -> Ether:
    attacker = world["attacker"]
    frame = Ether(src=attacker.mac, dst=to or attacker.host_mac)
    if kind is not None:
        frame.type = kind
    return frame


def ip(world: World, version: int, source: str, target: str, **fields: Any) -> Packet:
    header = IP if version == 4 else IPv6
    return ether(world) / header(src=source, dst=target, **fields)


def udp(mark: bytes = EVIL) -> Packet:
    return UDP(sport=PORT, dport=PORT) / Raw(mark)


def own(world: World, version: int) -> str:
    return str(world["attacker"].addresses[version])


def victims(world: World, version: int) -> list[str]:
    return [str(world[name].addresses[version]) for name in ("neighbour", "remote", "node1", "node2")]


# What a Pod may not say


def spoofed(world: World, version: int) -> Frames:
    """Every source that is not the attacker's own, to every victim."""
    sources = [str(world[name].addresses[version]) for name in ("neighbour", "remote", "node1", "node2")]
    if version == 4:
        sources += ["127.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "169.254.1.1"]
        sources += ["169.254.7.7", "10.244.1.0", "10.244.1.200", "10.244.2.0", "10.96.0.1", "8.8.8.8"]
    else:
        sources += ["::", "::1", ALL_NODES, "fe80::1", "fe80::bad", "fd00:10:1::", "fd00:10:1::200"]
        sources += ["fd00:10:2::", "2001:db8::1", "::ffff:10.244.1.12", "::10.244.1.12"]
    targets = [*victims(world, version), "192.168.99.2" if version == 4 else "fd99::2"]
    return [ip(world, version, source, target) / udp() for source in sources for target in targets]


def options(world: World) -> Frames:
    neighbour = str(world["neighbour"].addresses[4])
    lists = [IPOption_RR(), IPOption_LSRR(routers=[neighbour]), IPOption_Router_Alert()]
    return [
        ip(world, 4, source, target, options=[option]) / udp()
        for option in lists
        for source in (neighbour, "0.0.0.0")
        for target in victims(world, 4)
    ]


def source_routed(world: World) -> Frames:
    """From its own address, but through a node to where it does not want to be seen sending."""
    neighbour = str(world["neighbour"].addresses[4])
    way = IPOption_LSRR(routers=[neighbour], pointer=4)
    return [ip(world, 4, own(world, 4), target, options=[way]) / udp() for target in victims(world, 4)[2:]]


def fragments4(world: World) -> Frames:
    pieces: Frames = []
    for source in (str(world["neighbour"].addresses[4]), str(world["node1"].addresses[4])):
        for target in victims(world, 4):
            whole = ip(world, 4, source, target, id=77) / UDP(sport=PORT, dport=PORT) / Raw(EVIL * 40)
            pieces += fragment(whole, fragsize=160)
    return pieces


def mixed_fragments(world: World) -> Frames:
    """The first half as itself, the second as the neighbour with the same number: they must not be joined."""
    pieces: Frames = []
    for target in victims(world, 4):
        whole = ip(world, 4, own(world, 4), target, id=78) / UDP(sport=PORT, dport=PORT) / Raw(EVIL * 40)
        cut = fragment(whole, fragsize=240)
        for piece in cut[1:]:
            piece[IP].src = str(world["neighbour"].addresses[4])
            del piece[IP].chksum
        pieces += cut[1:]
    return pieces


def fragments6(world: World) -> Frames:
    source = str(world["neighbour"].addresses[6])
    return [
        ip(world, 6, source, target) / IPv6ExtHdrFragment(id=7, offset=offset, m=more, nh=17) / Raw(data)
        for target in victims(world, 6)
        for offset, more, data in (
            (0, 1, bytes(UDP(sport=PORT, dport=PORT, len=36)) + EVIL[:8]),
            (2, 0, EVIL),
        )
    ]


def headers6(world: World) -> Frames:
    """Extension headers between a source that is not its own and the rest."""
    source = str(world["neighbour"].addresses[6])
    chains = [
        IPv6ExtHdrHopByHop(),
        IPv6ExtHdrDestOpt(),
        IPv6ExtHdrRouting(type=0, addresses=[str(world["remote"].addresses[6])]),
        IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrDestOpt(),
        IPv6ExtHdrFragment(id=9),
    ]
    return [ip(world, 6, source, target) / chain / udp() for chain in chains for target in victims(world, 6)]


def arp(world: World) -> Frames:
    """Requests, replies, announcements and probes for the gateway, Pods and nodes."""
    mac = world["attacker"].mac
    claimed = ["169.254.1.1", *victims(world, 4), own(world, 4), "10.244.1.0"]
    frames: Frames = []
    for to in (BROADCAST, world["attacker"].host_mac, world["neighbour"].mac):
        for address in claimed:
            frames += [
                ether(world, to) / ARP(op=1, hwsrc=mac, psrc=own(world, 4), pdst=address),
                ether(world, to) / ARP(op=1, hwsrc=mac, psrc="0.0.0.0", pdst=address),
                ether(world, to) / ARP(op=1, hwsrc=mac, psrc=address, pdst=address),
                ether(world, to) / ARP(op=2, hwsrc=mac, psrc=address, hwdst=BROADCAST, pdst=address),
                ether(world, to) / ARP(op=2, hwsrc=mac, psrc=address, hwdst=to, pdst=own(world, 4)),
            ]
    return frames


def discovery(world: World) -> dict[str, Packet]:
    """Every message of neighbour and router discovery, as an attacker would fill it in."""
    mac, neighbour = world["attacker"].mac, str(world["neighbour"].addresses[6])
    return {
        "router advertisement": ICMPv6ND_RA(routerlifetime=1800, prf=1)
        / ICMPv6NDOptSrcLLAddr(lladdr=mac)
        / ICMPv6NDOptPrefixInfo(prefix="2001:db8:bad::", prefixlen=64),
        "router solicitation": ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=mac),
        "neighbour advertisement for another Pod": ICMPv6ND_NA(tgt=neighbour, R=0, S=0, O=1)
        / ICMPv6NDOptDstLLAddr(lladdr=mac),
        "neighbour advertisement for the gateway": ICMPv6ND_NA(tgt="fe80::1", R=1, S=1, O=1)
        / ICMPv6NDOptDstLLAddr(lladdr=mac),
        "neighbour advertisement for a node": ICMPv6ND_NA(tgt=str(world["node1"].addresses[6]), O=1)
        / ICMPv6NDOptDstLLAddr(lladdr=mac),
        "neighbour solicitation": ICMPv6ND_NS(tgt=neighbour) / ICMPv6NDOptSrcLLAddr(lladdr=mac),
        "neighbour solicitation for the gateway": ICMPv6ND_NS(tgt="fe80::1")
        / ICMPv6NDOptSrcLLAddr(lladdr=mac),
        "redirect": ICMPv6ND_Redirect(tgt=own(world, 6), dst="2001:db8::1"),
        "multicast listener query": ICMPv6MLQuery(mladdr="::"),
        "multicast listener report": ICMPv6MLReport(mladdr="ff02::bad"),
        "multicast listener report, version 2": ICMPv6MLReport2(
            records=[ICMPv6MLDMultAddrRec(rtype=4, dst="ff02::bad")]
        ),
    }


def sent_discovery(world: World, name: str, *headers: Packet) -> Frames:
    """The message to everybody, from its own address, a link-local one, the gateway's, and none."""
    frames: Frames = []
    for source in (own(world, 6), "fe80::bad", "fe80::1", "::"):
        for target in (ALL_NODES, "ff02::2", "ff02::16", "fe80::1", "ff02::1:ff00:12", *victims(world, 6)):
            to = "33:33:00:00:00:01" if target.startswith("ff") else ""
            packet = ether(world, to) / IPv6(src=source, dst=target, hlim=255)
            for header in headers:
                packet /= header.copy()
            frames.append(packet / discovery(world)[name])
    return frames


def fragmented_advertisement(world: World) -> Frames:
    """The type is in the second fragment: only who joins them can see it (RFC 7113)."""
    frames: Frames = []
    for target in (*victims(world, 6), ALL_NODES):
        whole = ether(world) / IPv6(src=own(world, 6), dst=target, hlim=255)
        body = bytes(IPv6ExtHdrDestOpt(nh=58) / discovery(world)["router advertisement"])
        for offset, more, data in ((0, 1, body[:8]), (1, 0, body[8:])):
            frames.append(whole / IPv6ExtHdrFragment(nh=60, id=11, offset=offset, m=more) / Raw(data))
    return frames


def redirects4(world: World) -> Frames:
    """ICMP redirects and router discovery, from its own address and from the gateway's."""
    frames: Frames = []
    inner = IP(src=str(world["neighbour"].addresses[4]), dst="8.8.8.8") / udp()
    for source in (own(world, 4), "169.254.1.1", str(world["node1"].addresses[4])):
        for target in victims(world, 4):
            for kind in (ICMP(type=5, code=1, gw=own(world, 4)), ICMP(type=9), ICMP(type=10)):
                frames.append(ip(world, 4, source, target) / kind.copy() / inner.copy())
    return frames


def tagged(world: World, *tags: Packet, spoof: bool = False) -> Frames:
    frames: Frames = []
    for version, header in ((4, IP), (6, IPv6)):
        for index, target in enumerate(victims(world, version)):
            source = victims(world, version)[index - 1] if spoof else own(world, version)
            for to in (world["attacker"].host_mac, BROADCAST):
                packet = ether(world, to)
                for tag in tags:
                    packet /= tag.copy()
                frames.append(packet / header(src=source, dst=target) / udp())
    return frames


def ethertypes(world: World) -> Frames:
    """LLDP, EAPOL, PPPoE, MPLS, PTP, loopback test, experimental ones, LLC with a spanning tree, garbage."""
    kinds = [0x88CC, 0x888E, 0x8863, 0x8864, 0x8847, 0x88F7, 0x9000, 0x88B5, 0x0842, 0x22F3, 0x6003, 0xFFFF]
    to = [world["attacker"].host_mac, BROADCAST, "01:80:c2:00:00:0e", world["neighbour"].mac]
    frames: Frames = [ether(world, each, kind) / Raw(EVIL * 5) for kind in kinds for each in to]
    frames += [Ether(src=world["attacker"].mac, dst=each, type=38) / LLC() / STP() for each in to]
    for version, other in ((4, 0x86DD), (6, 0x0800)):  # an IP header under the other family's name
        for target in victims(world, version):
            frames.append(
                ether(world, "", other)
                / (IP if version == 4 else IPv6)(src=own(world, version), dst=target)
                / udp()
            )
    return frames


def other_macs(world: World) -> Frames:
    """Spoofed sources in frames to everybody, to a group, to another Pod's MAC, and from another's MAC."""
    frames: Frames = []
    for version, header in ((4, IP), (6, IPv6)):
        source = str(world["neighbour"].addresses[version])
        for target in victims(world, version):
            for to in (BROADCAST, "01:00:5e:00:00:01", world["remote"].mac):
                frames.append(ether(world, to) / header(src=source, dst=target) / udp())
            frames.append(
                Ether(src=world["neighbour"].mac, dst=world["attacker"].host_mac)
                / header(src=source, dst=target)
                / udp()
            )
    return frames


def groups(world: World) -> Frames:
    """From its own address to everybody: multicast and broadcast are not forwarded, and no node answers."""
    everybody = [
        (4, "255.255.255.255", BROADCAST),
        (4, "224.0.0.1", "01:00:5e:00:00:01"),
        (4, "224.0.0.251", "01:00:5e:00:00:fb"),
        (4, "10.244.1.255", BROADCAST),
        (6, ALL_NODES, "33:33:00:00:00:01"),
        (6, "ff02::fb", "33:33:00:00:00:fb"),
    ]
    return [
        ether(world, to) / (IP if version == 4 else IPv6)(src=own(world, version), dst=target) / udp()
        for version, target, to in everybody
    ]


def encapsulated(world: World, outer: Packet, node: str, mark: bytes = EVIL) -> Packet:
    """A frame as the node's peer would send it, from a Pod that is not there to the one that is."""
    victim, source = ("neighbour", "10.244.2.77") if node == "node1" else ("remote", "10.244.1.77")
    inner = Ether(src=vtep_mac(PEER[node]), dst=vtep_mac(node))
    inner /= IP(src=source, dst=str(world[victim].addresses[4])) / udp(mark)
    return outer / UDP(sport=50000, dport=4789) / VXLAN(vni=9619, flags=8) / inner


def vxlan(world: World) -> Frames:
    """Into each node's tunnel, by every address the node has: its own, its tunnel's, one nobody knows."""
    aims = [("node1", address) for address in ("10.244.1.0", "fd00:10:1::")]
    aims += [("node2", address) for address in ("10.244.2.0", "fd00:10:2::", "192.168.99.2", "fd99::2")]
    aims += [(node, str(world[node].addresses[version])) for node in NODES for version in (4, 6)]
    frames: Frames = []
    for node, target in aims:
        version = 6 if ":" in target else 4
        for source in (own(world, version), str(world[PEER[node]].addresses[version])):
            frames.append(encapsulated(world, ip(world, version, source, target), node))
    return frames


CASES: dict[str, Callable[[World], Frames]] = {
    "spoofed source, IPv4": lambda world: spoofed(world, 4),
    "spoofed source, IPv6": lambda world: spoofed(world, 6),
    "spoofed source with IP options": options,
    "source routing": source_routed,
    "spoofed source in fragments, IPv4": fragments4,
    "spoofed source in the second fragment": mixed_fragments,
    "spoofed source in fragments, IPv6": fragments6,
    "spoofed source before extension headers": headers6,
    "spoofed source, other MACs": other_macs,
    "ARP": arp,
    "ICMP redirects and router discovery": redirects4,
    "advertisement in fragments": fragmented_advertisement,
    "VLAN tag": lambda world: tagged(world, Dot1Q(vlan=7)),
    "two VLAN tags": lambda world: tagged(world, Dot1AD(vlan=7), Dot1Q(vlan=8)),
    "two VLAN tags, the outer empty": lambda world: tagged(world, Dot1Q(vlan=0), Dot1Q(vlan=8)),
    "priority tag and a spoofed source": lambda world: tagged(world, Dot1Q(vlan=0, prio=7), spoof=True),
    "other ethertypes": ethertypes,
    "multicast and broadcast": groups,
}
MESSAGES = [
    "router advertisement",
    "router solicitation",
    "neighbour advertisement for another Pod",
    "neighbour advertisement for the gateway",
    "neighbour advertisement for a node",
    "neighbour solicitation",
    "neighbour solicitation for the gateway",
    "redirect",
    "multicast listener query",
    "multicast listener report",
    "multicast listener report, version 2",
]
HIDING: dict[str, tuple[Packet, ...]] = {
    "plain": (),
    "behind hop-by-hop options": (IPv6ExtHdrHopByHop(),),
    "behind destination options": (IPv6ExtHdrDestOpt(), IPv6ExtHdrDestOpt()),
    "in a lone fragment": (IPv6ExtHdrFragment(id=5),),
    "behind a routing header": (IPv6ExtHdrRouting(type=4, segleft=0, addresses=["fd00::1"]),),
}
for _message in MESSAGES:
    for _how, _headers in HIDING.items():
        CASES[f"{_message}, {_how}"] = lambda world, name=_message, headers=_headers: sent_discovery(
            world, name, *headers
        )


# How it is seen that nothing arrived


def send(world: World, frames: Frames) -> None:
    capture = world["attacker"].capture
    for frame in frames:
        with contextlib.suppress(OSError):  # a scrambled frame may be refused by the sender's own kernel
            capture.send(bytes(frame))


def good_packets(world: World, mark: bytes) -> Frames:
    return [
        ip(world, version, own(world, version), target) / udp(mark)
        for version in (4, 6)
        for target in victims(world, version)
    ]


def drained(world: World) -> None:
    for place in world.places.values():
        place.received()


def awaited(world: World, name: str, mark: bytes, seconds: float = 3.0) -> list[bytes]:
    """What the place's sockets got until both families' legitimate packets came, or the time was over."""
    got: list[bytes] = []
    deadline = time.monotonic() + seconds * SLOWNESS
    expected = {"node1": 0, "node2": 4}.get(name, 2)
    while time.monotonic() < deadline:
        got += world[name].received()
        seen = sum(mark in frame for frame in world[name].capture.frames)
        if got.count(mark) >= 2 and seen >= expected:
            break
        time.sleep(0.002)
    return got


def unwelcome(world: World, name: str, since: int, mark: bytes) -> list[str]:
    """The frames that came in beside the legitimate ones."""
    return [Ether(frame).summary() for frame in world[name].capture.frames[since:] if mark not in frame]


COUNTED = (
    "Icmp6InRouterAdvertisements",
    "Icmp6InRouterSolicits",
    "Icmp6InNeighborAdvertisements",
    "Icmp6InNeighborSolicits",
    "Icmp6InRedirects",
    "Icmp6InGroupMembQueries",
    "Icmp6InGroupMembResponses",
    "Icmp6InMLDv2Reports",
    "Icmp:InRedirects",
)


def state(world: World, name: str) -> str:
    """What an attack would change in a node: neighbours, addresses, routes, messages its kernel took."""
    counters = world[name].counters()
    parts: list[object] = [{key: counters[key] for key in COUNTED}]
    parts += [
        sorted(world[name].ip(*words.split()).splitlines())
        for words in (
            "neigh show",
            "-4 route show table all",
            "-6 route show table all",
            "-o addr show scope global",
        )
    ]
    return str(parts)


LAN_MAC = {number: f"02:66:00:00:00:0{number}" for number in (1, 2)}
SILENT = ("attacker", "neighbour", "remote", "node1", "node2")


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_it_arrives_anywhere(world: World, case: str) -> None:
    frames = CASES[case](world)
    assert frames
    mark = b"%s-%d" % (GOOD, list(CASES).index(case))
    drained(world)
    since = {name: len(world[name].capture.frames) for name in SILENT}
    before = {name: state(world, name) for name in ("node1", "node2", "neighbour", "remote")}

    send(world, [*frames, *good_packets(world, mark)])

    for name in ("neighbour", "remote", "node1", "node2"):
        assert awaited(world, name, mark) == [mark, mark], f"received by {name}"
    for name in SILENT:
        assert unwelcome(world, name, since[name], mark) == [], f"at {name}"
    assert {name: state(world, name) for name in before} == before


def test_a_pods_own_fragments_arrive(world: World) -> None:
    """Both families, to every place, and joined there."""
    drained(world)
    mark = GOOD * 40
    frames: Frames = []
    for version in (4, 6):
        for target in victims(world, version):
            whole = ip(world, version, own(world, version), target) / UDP(sport=PORT, dport=PORT) / Raw(mark)
            if version == 4:
                frames += fragment(whole, fragsize=160)
                continue
            body = bytes(whole[UDP])  # with its checksum
            for offset, more, data in ((0, 1, body[:160]), (20, 0, body[160:])):
                header = IPv6(src=own(world, 6), dst=target) / IPv6ExtHdrFragment(
                    id=21, offset=offset, m=more, nh=17
                )
                frames.append(ether(world) / header / Raw(data))
    send(world, frames)
    for name in ("neighbour", "remote", "node1", "node2"):
        got = [first(world, name), first(world, name)]
        assert got == [mark, mark], name


def from_the_lan(world: World, version: int, source: str, mark: bytes) -> Frames:
    """What somebody on the nodes' link sends to a Pod of node1."""
    header = IP if version == 4 else IPv6
    target = str(world["neighbour"].addresses[version])
    return [Ether(src=LAN_MAC[2], dst=LAN_MAC[1]) / header(src=source, dst=target) / udp(mark)]


@pytest.mark.parametrize("version", [4, 6])
def test_a_pods_address_does_not_come_from_elsewhere(world: World, version: int) -> None:
    """Beside what comes from its sender's own address, which arrives; IPv6 has no rp_filter to do this."""
    drained(world)
    since = len(world["neighbour"].capture.frames)
    for frame in from_the_lan(world, version, own(world, version), EVIL):
        world["node2"].capture.send(bytes(frame))
    for frame in from_the_lan(world, version, str(world["node2"].addresses[version]), GOOD):
        world["node2"].capture.send(bytes(frame))
    assert first(world, "neighbour") == GOOD
    assert unwelcome(world, "neighbour", since, GOOD) == []


def test_a_pod_cannot_speak_through_the_tunnel(new_world: NewWorld) -> None:
    """Beside what a peer says the same way, which arrives."""
    with new_world("vxlan") as world:
        send(world, vxlan(world))
        for node, victim in (("node1", "neighbour"), ("node2", "remote")):
            world[PEER[node]].capture.send(bytes(from_peer(world, node, GOOD)))
            assert first(world, victim) == GOOD
        for name in ("attacker", "neighbour", "remote", "node1", "node2"):
            assert EVIL not in world[name].received()
        for name in ("attacker", "neighbour", "remote"):
            assert unwelcome(world, name, 0, GOOD) == []
        for frame in world["node2"].capture.frames:
            assert EVIL not in frame or own_in_tunnel(world, Ether(frame)), "only to a tunnel's own address"


def from_peer(world: World, node: str, mark: bytes) -> Packet:
    source, target = world[PEER[node]].addresses[4], world[node].addresses[4]
    number = node[-1]
    outer = Ether(src=f"02:66:00:00:00:0{3 - int(number)}", dst=f"02:66:00:00:00:0{number}")
    return encapsulated(world, outer / IP(src=str(source), dst=str(target)), node, mark)


def own_in_tunnel(world: World, packet: Packet) -> bool:
    """Whether a packet in the tunnel has the attacker's own address, as it may."""
    inner = packet[VXLAN].payload.payload  # behind the inner Ethernet header
    return inner.src in (own(world, 4), own(world, 6))


def first(world: World, name: str, seconds: float = 3.0) -> bytes:
    """The first packet that a place's socket gets."""
    deadline = time.monotonic() + seconds * SLOWNESS
    while time.monotonic() < deadline:
        for sock in world[name].sockets.values():
            with contextlib.suppress(BlockingIOError):
                return bytes(sock.recv(65536))
        time.sleep(0.002)
    return b""


ARRIVES: dict[str, tuple[str, Callable[[World], Frames]]] = {
    "spoofed source, IPv4": ("neighbour", lambda world: spoofed(world, 4)),
    "spoofed source, IPv6": ("remote", lambda world: spoofed(world, 6)),
    "spoofed source before extension headers": ("neighbour", headers6),
    "VXLAN into its own node": ("neighbour", vxlan),
    "VXLAN into the other node": ("remote", vxlan),
}


def test_without_the_rules_the_same_packets_do_arrive(new_world: NewWorld) -> None:
    """So it is the rules that stop them, and these tests can fail."""
    with new_world("vxlan") as world:
        for node in NODES:
            world[node].nft("delete table inet podwall\ndelete table arp podwall")
        for case, (victim, frames) in ARRIVES.items():
            drained(world)
            send(world, frames(world))
            assert first(world, victim) == EVIL, case
        for version in (4, 6):
            drained(world)
            for frame in from_the_lan(world, version, own(world, version), EVIL):
                world["node2"].capture.send(bytes(frame))
            assert first(world, "neighbour") == EVIL, f"from the nodes' link, IPv{version}"
        since = len(world["attacker"].capture.frames)
        send(world, arp(world))
        answered = world["attacker"].capture.wait(lambda frame: ARP in Ether(frame))
        assert answered is not None, "the node tells its MAC to who asks"
        assert len(world["attacker"].capture.frames) > since
