"""A Pod's attachment to its node: known before anything is made, and what everything is made from.

Names and hardware addresses follow from container and interface, so that nothing has to be asked of the
kernel:

    container_id/ifname --sha256--> podwallXXXXXXXX   the link's host end
                                    podwalliXXXXXXX   the device that shapes what the Pod sends, if any
                                    02:..:..          hardware addresses of both ends
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

from cni.spec import AttachmentKey, Bandwidth, PortMapping

IPAddress: TypeAlias = IPv4Address | IPv6Address

LINK_NAME = re.compile(r"podwall[0-9a-f]{8}")
"""Host ends of Pod links; no other device of podwall is named so."""

SHAPER_NAME = re.compile(r"podwalli[0-9a-f]{7}")

GATEWAYS: dict[int, IPAddress] = {4: IPv4Address("169.254.1.1"), 6: IPv6Address("fe80::1")}
"""The Pod's next hop in each family: nobody's address; a permanent neighbour entry leads to the host end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One Pod interface on this node: `mac` is the Pod end's, `host_mac` the host end's, `mtu` in bytes."""

    container_id: str
    ifname: str
    link: str
    namespace: str
    pod: str
    pod_uid: str
    addresses: tuple[IPAddress, ...]
    mac: str
    host_mac: str
    mtu: int
    netns: str = ""
    network: str = ""
    bandwidth: Bandwidth | None = None
    port_mappings: tuple[PortMapping, ...] = ()

    @property
    def key(self) -> AttachmentKey:
        """What CNI names it by."""
        return AttachmentKey(self.container_id, self.ifname)

    @property
    def shaper(self) -> str:
        """The name of the device that shapes what the Pod sends."""
        return shaper_name(self.link)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}" if self.pod else f"{self.container_id[:12]}/{self.ifname}"


class Identity(NamedTuple):
    """The names and hardware addresses an attachment may have."""

    link: str
    mac: str
    host_mac: str


def identities(key: AttachmentKey) -> Iterator[Identity]:
    """Yield the attachment's names, best first; the next is taken where a live link has the one before."""
    digest = sha256(f"{key.container_id}/{key.ifname}".encode()).digest()
    while True:
        yield Identity(f"podwall{digest[:4].hex()}", _mac(digest[4:9]), _mac(digest[9:14]))
        digest = sha256(digest).digest()


def shaper_name(link: str) -> str:
    """The name of the shaping device beside a link: 15 bytes hold seven of its eight digits."""
    return f"podwalli{link[7:14]}"


def _mac(tail: bytes) -> str:
    return bytes((2, *tail)).hex(":")  # 02: locally administered, unicast
