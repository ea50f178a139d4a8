"""A node and a client on one link, in network namespaces of their own.

node  eth0 192.0.2.1/24 2001:db8::1/64  <----veth---->  eth0 192.0.2.7/24 2001:db8::7/64  client
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.utils6 import in6_getnsma, in6_getnsmac

from agent.cluster.model import IPAddress
from lab import netns
from lab.capture import Capture
from lab.limits import SLOWNESS
from tests.linux import command

NODE_MAC, CLIENT_MAC = "02:00:00:00:01:01", "02:00:00:00:01:07"
LAST_4, LAST_6 = "192.0.2.250", "2001:db8::250"
"""What the node answers for in every test; asked last, answered last."""

NUMBERS = itertools.count()


async def until(condition: Callable[[], object], limit_s: float = 20.0 * SLOWNESS) -> None:
    """Await that something holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s"
        await asyncio.sleep(0.01)


def address_told(frame: bytes) -> tuple[IPAddress, str] | None:
    """The address that an ARP frame or neighbour advertisement speaks for, and the MAC it tells."""
    packet = Ether(frame)
    if ARP in packet:
        return ip_address(packet[ARP].psrc), packet[ARP].hwsrc
    if ICMPv6ND_NA in packet:
        return ip_address(packet[ICMPv6ND_NA].tgt), packet[ICMPv6ND_NA].payload.lladdr
    return None


@dataclass
class Link:
    """The two ends, and what the client hears."""

    node: str
    client: str
    capture: Capture

    def ip(self, place: str, lines: str) -> str:
        return command("ip", "-n", place, "-batch", "-", data=lines)

    def run(self, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine inside the node's namespace."""
        netns.run(netns.path(self.node), asyncio.run, story())

    async def next(self, wanted: Callable[[bytes], bool], seconds: float = 5.0) -> Any:
        """The first frame wanted, as a packet; None when there was none in time."""
        frame = await asyncio.to_thread(self.capture.wait, wanted, seconds)
        return None if frame is None else Ether(frame)

    async def settled(self) -> None:
        """Return when the node has read everything that was sent to it before: it is asked two more."""
        for ask, address in ((arp_request(LAST_4), LAST_4), (solicitation(LAST_6), LAST_6)):
            seen = len(self.capture.frames)
            self.capture.send(ask)
            await until(lambda: ip_address(address) in self.told(seen))  # noqa: B023 - awaited at once

    def told(self, seen: int = 0) -> dict[IPAddress, str]:
        """The MAC of each address that somebody spoke for, since that many frames."""
        return dict(filter(None, map(address_told, self.capture.frames[seen:])))


def arp_request(target: str, source: str = "192.0.2.7") -> bytes:
    frame = Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(
        op=1, hwsrc=CLIENT_MAC, psrc=source, hwdst="00:00:00:00:00:00", pdst=target
    )
    return bytes(frame)


def solicitation(target: str, source: str = "2001:db8::7", **changes: Any) -> bytes:
    """A neighbour solicitation as the client's kernel sends it; changes replace what stands in it."""
    group = in6_getnsma(socket.inet_pton(socket.AF_INET6, target))
    destination = changes.pop("dst", socket.inet_ntop(socket.AF_INET6, group))
    ether = Ether(src=CLIENT_MAC, dst=changes.pop("mac", in6_getnsmac(group)))
    options = changes.pop("options", ICMPv6NDOptSrcLLAddr(lladdr=CLIENT_MAC))
    head = IPv6(src=source, dst=destination, hlim=changes.pop("hlim", 255))
    body = ICMPv6ND_NS(tgt=target, **changes)
    return bytes(ether / head / (body / options if options else body))


@contextlib.contextmanager
def made() -> Iterator[Link]:
    """A node and a client, for as long as they are needed."""
    stem = f"podwall-lb{os.getpid()}-{next(NUMBERS)}"
    node, client = f"{stem}-node", f"{stem}-client"
    try:
        netns.create(node)
        netns.create(client)
        command(
            *("ip", "-n", node, "link", "add", "eth0", "address", NODE_MAC, "type", "veth", "peer"),
            *("name", "eth0", "address", CLIENT_MAC, "netns", client),
        )
        for place, host in ((node, 1), (client, 7)):
            command(
                *("ip", "-n", place, "-batch", "-"),
                data=f"""addr add 192.0.2.{host}/24 dev eth0
                addr add 2001:db8::{host}/64 dev eth0 nodad
                link set eth0 up""",
            )
        with Capture(netns.path(client), "eth0", incoming_only=True) as capture:
            yield Link(node, client, capture)
    finally:
        netns.remove(node)
        netns.remove(client)
