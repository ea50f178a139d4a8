"""The speaker against a real kernel: what a client on the link hears, and what it never hears."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether

from agent.cluster.model import IPAddress
from agent.loadbalancer.speaker import Speaker, SpeakerError, has_carrier
from lab import netns
from tests.agent.loadbalancer.onelink import (
    CLIENT_MAC,
    LAST_4,
    LAST_6,
    NODE_MAC,
    Link,
    address_told,
    arp_request,
    command,
    solicitation,
    until,
)

FOUR, SIX = ip_address("192.0.2.200"), ip_address("2001:db8::200")
ALWAYS = frozenset({ip_address(LAST_4), ip_address(LAST_6)})
OWN = frozenset({FOUR, SIX})


@contextlib.asynccontextmanager
async def speaking(addresses: frozenset[IPAddress] = OWN) -> AsyncIterator[Speaker]:
    speaker = Speaker("eth0", lambda _: True)
    try:
        speaker.speak_for(addresses | ALWAYS)
        yield speaker
    finally:
        speaker.close()


def test_a_client_finds_the_addresses(link: Link) -> None:
    """The client's kernel asks and believes the answer; the node's kernel has not got the addresses."""

    async def story() -> None:
        async with speaking():
            for family, address in ((socket.AF_INET, FOUR), (socket.AF_INET6, SIX)):
                link.ip(link.client, f"neigh flush to {address}")
                with netns.run(netns.path(link.client), socket.socket, family, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"x", (str(address), 9))
                await until(lambda: NODE_MAC in link.ip(link.client, f"neigh show {address} nud reachable"))  # noqa: B023
            assert str(FOUR) not in link.ip(link.node, "addr show")

    link.run(story)


def test_what_the_answers_say(link: Link) -> None:
    async def story() -> None:
        async with speaking():
            await link.settled()
            seen = len(link.capture.frames)
            link.capture.send(arp_request(str(FOUR)))
            link.capture.send(solicitation(str(SIX)))
            await link.settled()
            answers = [Ether(frame) for frame in link.capture.frames[seen:]]
            four = [
                each
                for each in answers
                if ARP in each and each[ARP].psrc == str(FOUR) and each.dst == CLIENT_MAC
            ]
            assert [(each[ARP].op, each[ARP].hwsrc, each[ARP].pdst) for each in four] == [
                (2, NODE_MAC, "192.0.2.7")
            ]
            six = [each for each in answers if ICMPv6ND_NA in each and each[ICMPv6ND_NA].tgt == str(SIX)]
            six = [each for each in six if each[ICMPv6ND_NA].S]
            assert [(each[IPv6].src, each[IPv6].dst, each.src) for each in six] == [
                (str(SIX), "2001:db8::7", NODE_MAC)
            ]

    link.run(story)


SILENT = {
    "another IPv4 address": arp_request("192.0.2.201"),
    "another IPv6 address": solicitation("2001:db8::201"),
    "an IPv6 address with the same last 32 bits": solicitation("2001:db8:1::200"),
    "a solicitation that was routed": solicitation(str(SIX), hlim=64),
    "a solicitation with a wrong checksum": solicitation(str(SIX), cksum=1),
    "a request in a VLAN": bytes(
        Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff")
        / Dot1Q(vlan=7)
        / ARP(op=1, hwsrc=CLIENT_MAC, psrc="192.0.2.7", pdst=str(FOUR))
    ),
    "a request for somebody else's card": arp_request(str(FOUR)).replace(b"\xff" * 6, b"\x02\0\0\0\0\x99", 1),
    "half a request": arp_request(str(FOUR))[:30],
}


@pytest.mark.parametrize("case", SILENT, ids=list(SILENT))
def test_silence(link: Link, case: str) -> None:
    async def story() -> None:
        async with speaking():
            await link.settled()
            await link.next(lambda frame: address_told(frame) == (SIX, NODE_MAC))  # its announcement
            seen = len(link.capture.frames)
            link.capture.send(SILENT[case])
            await link.settled()
            directed = [frame for frame in link.capture.frames[seen:] if not frame[0] & 1]
            told = {told[0] for told in map(address_told, directed) if told}
            assert not told - ALWAYS - {ip_address("192.0.2.1"), ip_address("2001:db8::1")}

    link.run(story)


def test_who_may_not_answer_is_silent_at_once(link: Link) -> None:
    """Also when nobody has told the speaker that its time is over."""
    allowed = {FOUR, SIX}

    async def story() -> None:
        speaker = Speaker("eth0", lambda ip: ip in allowed | ALWAYS)
        try:
            speaker.speak_for(OWN | ALWAYS)
            await link.settled()
            allowed.clear()
            seen = len(link.capture.frames)
            link.capture.send(arp_request(str(FOUR)))
            link.capture.send(solicitation(str(SIX)))
            await asyncio.sleep(0.6)  # the time at which it would announce them again
            await link.settled()
            assert not OWN & link.told(seen).keys()
        finally:
            speaker.close()

    link.run(story)


def test_taking_an_address_corrects_what_neighbours_have(link: Link) -> None:
    """Another node had them: the client's entries hold its MAC, and change without being asked for."""
    other = "02:00:00:00:01:99"

    async def story() -> None:
        for address in OWN:
            link.ip(link.client, f"neigh replace {address} lladdr {other} dev eth0 nud stale")
        async with speaking():
            for address in OWN:
                await until(lambda: NODE_MAC in link.ip(link.client, f"neigh show {address}"))  # noqa: B023

    link.run(story)


def test_announcements_are_repeated_and_only_new_addresses_have_them(link: Link) -> None:
    late = ip_address("192.0.2.210")

    def told(address: IPAddress) -> int:
        """How often the client was told of an address; of an IPv4 address it is in two forms each time."""
        return [told[0] for told in map(address_told, link.capture.frames) if told].count(address)

    async def story() -> None:
        async with speaking() as speaker:
            speaker.speak_for(OWN | ALWAYS | {late})
            await until(lambda: told(late) == 6)
            speaker.speak_for(ALWAYS)
            assert (told(FOUR), told(SIX)) == (6, 3), "not once more for the late one"
            await until(lambda: told(ip_address(LAST_6)) == 4)
            assert (told(FOUR), told(SIX), told(late)) == (6, 3, 6), "given up before the fourth time"

    link.run(story)


def groups(link: Link) -> set[str]:
    lines = netns.run(netns.path(link.node), Path("/proc/thread-self/net/igmp6").read_text).splitlines()
    return {line.split()[2] for line in lines if line.split()[1] == "eth0"}


def test_groups_are_joined_and_left(link: Link) -> None:
    async def story() -> None:
        before = groups(link)
        async with speaking(frozenset({SIX})) as speaker:
            assert groups(link) - before == {
                "ff0200000000000000000001ff000200",
                "ff0200000000000000000001ff000250",
            }
            speaker.speak_for(ALWAYS)
            assert groups(link) - before == {"ff0200000000000000000001ff000250"}
        assert groups(link) == before

    link.run(story)


def test_more_addresses_than_one_socket_has_groups_or_one_filter_room(link: Link) -> None:
    many = frozenset(ip_address(f"2001:db8::{number:x}") for number in range(0x1000, 0x1000 + 1500))
    many |= {ip_address(0x0A000001 + number) for number in range(1500)}

    async def story() -> None:
        async with speaking(many):
            assert len(groups(link)) > 1500
            for ask, address in (
                (arp_request("10.0.5.1"), "10.0.5.1"),
                (solicitation("2001:db8::1111"), "2001:db8::1111"),
            ):
                link.capture.send(ask)
                assert await link.next(
                    lambda frame: not frame[0] & 1 and address_told(frame) == (ip_address(address), NODE_MAC)  # noqa: B023
                )

    link.run(story)


def test_somebody_else_who_claims_an_address_is_told_once(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    claim = bytes(
        Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff")
        / ARP(op=2, hwsrc=CLIENT_MAC, psrc=str(FOUR), hwdst=CLIENT_MAC, pdst=str(FOUR))
    )

    async def story() -> None:
        async with speaking():
            for _ in range(3):
                link.capture.send(claim)
            await link.settled()

    link.run(story)
    rivals = [record for record in caplog.messages if "address-rival" in record]
    assert len(rivals) == 1
    assert CLIENT_MAC in rivals[0]


def test_a_link_that_goes_down_and_comes_back(link: Link) -> None:
    async def story() -> None:
        async with speaking():
            await link.settled()
            assert has_carrier("eth0")
            link.ip(link.node, "link set eth0 down")
            assert not has_carrier("eth0")
            await asyncio.sleep(0.05)  # the speaker hears of it
            link.ip(link.node, "link set eth0 up")
            await until(lambda: has_carrier("eth0"))
            await link.settled()
            link.ip(link.client, "link set eth0 down")
            await until(lambda: not has_carrier("eth0"))

    link.run(story)


def test_a_link_on_which_nobody_can_answer(link: Link) -> None:
    async def story() -> None:
        with pytest.raises(SpeakerError, match="uplink eth7: no interface with this name"):
            Speaker("eth7", lambda _: True)
        with pytest.raises(SpeakerError, match="uplink lo is no Ethernet link"):
            Speaker("lo", lambda _: True)

    assert not has_carrier("eth7")
    link.run(story)


DNAT = """table ip test {
    chain prerouting {
        type nat hook prerouting priority dstnat
        ip daddr 192.0.2.200 tcp dport 80 dnat to 192.0.2.1:8080
    }
}"""


def test_the_kernel_routes_packets_to_an_address_that_it_does_not_have(link: Link) -> None:
    """With the strictest source check, and nothing but a translation in prerouting."""
    for name in ("all", "eth0"):
        path = Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter")
        netns.run(netns.path(link.node), path.write_text, "1")
    command("ip", "netns", "exec", link.node, "nft", "-f", "-", data=DNAT)

    async def story() -> None:
        async with speaking():
            listener = await asyncio.start_server(lambda _, writer: writer.close(), "192.0.2.1", 8080)
            client = netns.run(netns.path(link.client), socket.socket)
            client.setblocking(False)
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(client, (str(FOUR), 80)), 5)
            client.close()
            listener.close()
            await listener.wait_closed()

    link.run(story)
