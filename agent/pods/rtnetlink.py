"""Rtnetlink in bytes: the few messages that wire a Pod, and a socket that sends many of them at once.

    [setlink up][newaddr][newroute]...  --one send-->  kernel  --an answer each-->  first error, if any

The kernel works through a batch before the send returns, so a Pod's whole side costs two system calls.
Written out here because it is on every Pod's way: building one such message with pyroute2's classes takes
40 to 165 microseconds (a Pod needs 17), here 2 to 5. Layouts: linux/netlink.h, linux/rtnetlink.h,
linux/if_link.h, linux/neighbour.h, linux/pkt_sched.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address

PROTOCOL = 112
"""rtm_protocol of every route and protocol of every neighbour entry that podwall makes."""

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_NEWQDISC, RTM_NEWTFILTER = 36, 44

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
REPLACE, EXCLUDE, CREATE = 0x100, 0x200, 0x400

IFF_UP = 0x1
NUD_PERMANENT = 0x80
_RTN_LOCAL = 2
SCOPE_GLOBAL, SCOPE_LINK = 0, 253
TABLE_MAIN = 254
NESTED = 0x8000

HEADER = struct.Struct("=IHHII")
IFINFO = struct.Struct("=BxHiII")
IFADDR = struct.Struct("=BBBBI")
ROUTE = struct.Struct("=BBBBBBBBI")
NEIGHBOUR = struct.Struct("=BxxxiHBB")
"""Of any message, and what comes behind it in those about links, addresses, routes and neighbours."""

_ATTRIBUTE = struct.Struct("=HH")
_TRAFFIC = struct.Struct("=BxxxiIII")
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12
_NLMSG_ERROR, _NLMSG_DONE, _INTERRUPTED = 2, 3, 0x10
_RECEIVE = 1 << 18
_BATCH = 64  # the answers to one send must fit into the socket's receive buffer


class Request(NamedTuple):
    """One message without its header; `what` says in an error what was tried."""

    kind: int
    flags: int
    body: bytes
    what: str


class RtnetlinkError(OSError):
    """The kernel refused a message: `errno`, and what was tried with the kernel's own words."""


class Link(NamedTuple):
    """A device as the kernel describes it."""

    device: int
    name: str
    kind: str
    up: bool
    mtu: int
    mac: str
    group: int
    alias: str


class Route(NamedTuple):
    """A route of the main table: `target` as address and prefix length, next hop (None: on the link)."""

    target: tuple[IPAddress | None, int]
    gateway: IPAddress | None
    device: int
    protocol: int


class Neighbour(NamedTuple):
    """A permanent neighbour entry."""

    address: IPAddress
    mac: str
    device: int


class Place(NamedTuple):
    """Where traffic control acts: the fields of tcmsg."""

    device: int
    parent: int
    handle: int = 0
    information: int = 0


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = 4 + len(data)
    return _ATTRIBUTE.pack(size, kind) + data + bytes(-size % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute of attributes."""
    return attribute(kind | NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """An attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a C string."""
    return attribute(kind, value.encode() + b"\0")


def mac_bytes(mac: str) -> bytes:
    """A hardware address as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def family(address: IPAddress) -> int:
    """The address family that rtnetlink calls the address's."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


# Links

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_OPERSTATE, _IFLA_LINKINFO = 1, 3, 4, 16, 18
_IF_OPER_UP = b"\x06"
_IFLA_IFALIAS, _IFLA_AF_SPEC, _IFLA_GROUP, _IFLA_NET_NS_FD = 20, 26, 27, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_ADDR_GEN_NONE = nest(_IFLA_AF_SPEC, nest(socket.AF_INET6, attribute(8, b"\x01")))
"""IFLA_INET6_ADDR_GEN_MODE none: the kernel gives the link no address of its own choosing."""


def new_veth(*, link: str, mac: str, peer: str, peer_mac: str, mtu: int, netns: int) -> Request:
    """A pair of which one end is born in another namespace, given by descriptor."""
    born = IFINFO.pack(0, 0, 0, 0, 0) + b"".join(
        (
            text(_IFLA_IFNAME, peer),
            attribute(_IFLA_ADDRESS, mac_bytes(peer_mac)),
            number(_IFLA_MTU, mtu),
            number(_IFLA_NET_NS_FD, netns),
        )
    )
    pair = nest(_IFLA_LINKINFO, text(_INFO_KIND, "veth"), nest(_INFO_DATA, attribute(_VETH_INFO_PEER, born)))
    ends = text(_IFLA_IFNAME, link) + attribute(_IFLA_ADDRESS, mac_bytes(mac)) + number(_IFLA_MTU, mtu)
    body = IFINFO.pack(0, 0, 0, 0, 0) + ends + pair
    return Request(RTM_NEWLINK, CREATE | EXCLUDE, body, f"make link {link} with {peer} in the Pod")


def new_device(name: str, kind: str, mtu: int) -> Request:
    """A device without a pair, up from the start."""
    body = IFINFO.pack(0, 0, 0, IFF_UP, IFF_UP) + text(_IFLA_IFNAME, name) + number(_IFLA_MTU, mtu)
    body += nest(_IFLA_LINKINFO, text(_INFO_KIND, kind))
    return Request(RTM_NEWLINK, CREATE | EXCLUDE, body, f"make {kind} device {name}")


def without_own_addresses(name: str, index: int, alias: str = "") -> Request:
    """The link takes no address by itself; `alias` says whose it is to whoever looks."""
    body = IFINFO.pack(0, 0, index, 0, 0) + _ADDR_GEN_NONE
    if alias:
        body += attribute(_IFLA_IFALIAS, alias.encode())
    return Request(RTM_SETLINK, 0, body, f"turn off address generation of {name}")


def set_up(name: str, index: int) -> Request:
    """The link comes up."""
    return Request(RTM_SETLINK, 0, IFINFO.pack(0, 0, index, IFF_UP, IFF_UP), f"set {name} up")


def set_down_into_group(name: str, group: int) -> Request:
    """The link goes down, with its routes and neighbours, and is marked for removal with its group."""
    body = IFINFO.pack(0, 0, 0, 0, IFF_UP) + text(_IFLA_IFNAME, name) + number(_IFLA_GROUP, group)
    return Request(RTM_SETLINK, 0, body, f"set {name} down")


def delete_group(group: int) -> Request:
    """All links of a group go, at the price of one: the wait for readers (16 ms) is paid once."""
    return Request(RTM_DELLINK, 0, IFINFO.pack(0, 0, 0, 0, 0) + number(_IFLA_GROUP, group), "delete links")


def parse_link(body: bytes) -> Link:
    """Read a device from a listing."""
    index, flags = struct.unpack_from("=iI", body, 4)
    values = attributes(body, IFINFO.size)
    information = attributes(values.get(_IFLA_LINKINFO, b""))
    return Link(
        device=index,
        name=_string(values.get(_IFLA_IFNAME, b"")),
        kind=_string(information.get(_INFO_KIND, b"")),
        up=bool(flags & IFF_UP),
        mtu=_number(values.get(_IFLA_MTU)),
        mac=values.get(_IFLA_ADDRESS, b"").hex(":"),
        group=_number(values.get(_IFLA_GROUP)),
        alias=_string(values.get(_IFLA_IFALIAS, b"")),
    )


# Addresses, routes, neighbours

_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_F_NODAD = 1, 2, 8, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_NDA_DST, _NDA_LLADDR, _NDA_PROTOCOL = 1, 2, 12


def new_address(address: IPAddress, index: int) -> Request:
    """The whole address, usable at once: duplicate address detection would hold IPv6 back for a second."""
    body = IFADDR.pack(family(address), address.max_prefixlen, _IFA_F_NODAD, SCOPE_GLOBAL, index)
    body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
    body += number(_IFA_FLAGS, _IFA_F_NODAD)
    return Request(RTM_NEWADDR, CREATE | EXCLUDE, body, f"give the Pod {address}")


def new_route(
    target: IPAddress | None,
    index: int,
    gateway: IPAddress | None = None,
    replace: bool = False,
) -> Request:
    """A route to one address, through the gateway or straight onto the link; or (None) to everything."""
    of = target or gateway
    assert of is not None, "a default route has a gateway"
    scope = SCOPE_GLOBAL if gateway else SCOPE_LINK
    length = target.max_prefixlen if target else 0
    body = ROUTE.pack(family(of), length, 0, 0, TABLE_MAIN, PROTOCOL, scope, 1, 0)
    body += attribute(_RTA_DST, target.packed) if target else b""
    body += attribute(_RTA_GATEWAY, gateway.packed) if gateway else b""
    flags = CREATE | (REPLACE if replace else EXCLUDE)
    return Request(RTM_NEWROUTE, flags, body + number(_RTA_OIF, index), f"route {target or 'default'}")


def new_neighbour(address: IPAddress, mac: str, index: int) -> Request:
    """A neighbour that is never asked for."""
    body = NEIGHBOUR.pack(family(address), index, NUD_PERMANENT, 0, 0)
    body += attribute(_NDA_DST, address.packed) + attribute(_NDA_LLADDR, mac_bytes(mac))
    body += attribute(_NDA_PROTOCOL, bytes((PROTOCOL,)))
    return Request(RTM_NEWNEIGH, CREATE | REPLACE, body, f"neighbour {address}")


def parse_address(body: bytes) -> tuple[int, IPAddress, int]:
    """Read index, address and prefix length from a listing."""
    length, index = body[1], struct.unpack_from("=I", body, 4)[0]
    values = attributes(body, IFADDR.size)
    return index, ip_address(values.get(_IFA_LOCAL) or values[_IFA_ADDRESS]), length


def parse_route(body: bytes) -> Route | None:
    """Read a route from a listing; None for one that is not plain unicast of the main table."""
    _, length, _, _, table, protocol, _, kind, _ = ROUTE.unpack_from(body)
    values = attributes(body, ROUTE.size)
    if _number(values.get(_RTA_TABLE), table) != TABLE_MAIN or kind != 1 or _RTA_OIF not in values:
        return None
    target = ip_address(values[_RTA_DST]) if _RTA_DST in values else None
    gateway = ip_address(values[_RTA_GATEWAY]) if _RTA_GATEWAY in values else None
    return Route((target, length), gateway, _number(values[_RTA_OIF]), protocol)


def parse_neighbour(body: bytes) -> Neighbour | None:
    """Read a neighbour from a listing; None for one that is not permanent."""
    _, index, state, _, _ = NEIGHBOUR.unpack_from(body)
    values = attributes(body, NEIGHBOUR.size)
    if not state & NUD_PERMANENT or _NDA_DST not in values:
        return None
    return Neighbour(ip_address(values[_NDA_DST]), values.get(_NDA_LLADDR, b"").hex(":"), index)


# Traffic control


def new_traffic(kind: int, name: str, place: Place, options: bytes) -> Request:
    """A queueing discipline or filter `name` of a device."""
    body = _TRAFFIC.pack(0, place.device, place.handle, place.parent, place.information)
    return Request(kind, CREATE | EXCLUDE, body + text(1, name) + options, f"limit bandwidth by {name}")


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Read the attributes that begin at an offset."""
    found = {}
    while offset + 4 <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + size]
        offset += (size + 3) & ~3
    return found


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None, default: int = 0) -> int:
    return int(struct.unpack("=I", value)[0]) if value else default


class Rtnetlink:
    """A socket to the rtnetlink of the namespace of the calling thread; for one thread at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        for option in (_CAP_ACK, _EXT_ACK, _STRICT):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._sequence = 0

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, *requests: Request) -> None:
        """Have all requests done, in order; those behind a refused one are tried as well.

        Raises RtnetlinkError for the first that was refused.
        """
        refused = self.outcomes(*requests)
        for error in refused:
            if error:
                raise error

    def outcomes(self, *requests: Request) -> list[RtnetlinkError | None]:
        """Have all requests done, in order; say of each how it went."""
        batches = (requests[i : i + _BATCH] for i in range(0, len(requests), _BATCH))
        return [outcome for batch in batches for outcome in self._outcomes(batch)]

    def _outcomes(self, requests: Sequence[Request]) -> list[RtnetlinkError | None]:
        first = self._sequence + 1
        self._sequence += len(requests)
        self._socket.send(
            b"".join(
                HEADER.pack(16 + len(body), kind, flags | REQUEST | ACK, first + i, 0) + body
                for i, (kind, flags, body, _) in enumerate(requests)
            )
        )
        found: list[RtnetlinkError | None] = [None] * len(requests)
        waiting = len(requests)
        while waiting:
            for kind, flags, sequence, body in self._receive():
                if kind == _NLMSG_ERROR and sequence >= first:
                    waiting -= 1
                    found[sequence - first] = _error(requests[sequence - first], flags, body)
        return found

    def listing(self, kind: int, filter_: bytes) -> list[bytes]:
        """Return the bodies of a listing; `filter_` is the request's own header."""
        for _ in range(5):
            whole, bodies = self._dump(kind, filter_)
            if whole:
                return bodies
        raise RtnetlinkError(errno.EAGAIN, "the kernel's listing changed five times while it was read")

    def _dump(self, kind: int, filter_: bytes) -> tuple[bool, list[bytes]]:
        self._sequence += 1
        self._socket.send(HEADER.pack(16 + len(filter_), kind, REQUEST | DUMP, self._sequence, 0) + filter_)
        bodies: list[bytes] = []
        whole = True
        while True:
            for type_, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                whole = whole and not flags & _INTERRUPTED
                if type_ == _NLMSG_DONE:
                    return whole, bodies
                if type_ == _NLMSG_ERROR:
                    raise _error(Request(kind, 0, b"", "list"), flags, body) or RtnetlinkError(
                        errno.EIO, "list"
                    )
                bodies.append(body)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(_RECEIVE)
        offset = 0
        while offset + 16 <= len(data):
            size, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset + 16 : offset + size]
            offset += (size + 3) & ~3

    def operational(self, index: int) -> bool:
        """Whether a device sends: up, with a carrier, and the kernel has begun to act on that.

        That happens in the background; since Linux 6.8 at once when this is asked. Raises RtnetlinkError.
        """
        answer = self._get(Request(RTM_GETLINK, 0, IFINFO.pack(0, 0, index, 0, 0), "look at the link"))
        return attributes(answer, IFINFO.size).get(_IFLA_OPERSTATE) == _IF_OPER_UP

    def is_own(self, address: IPAddress) -> bool:
        """Whether packets to an address are taken in here, not forwarded. Raises RtnetlinkError.

        An IPv6 address is so only some time after it was added: the kernel does that in the background.
        """
        body = ROUTE.pack(family(address), address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        body += attribute(_RTA_DST, address.packed)
        answer = self._get(Request(RTM_GETROUTE, 0, body, f"look up the route to {address}"))
        kind: int = ROUTE.unpack_from(answer)[7]
        return kind == _RTN_LOCAL

    def _get(self, request: Request) -> bytes:
        """Ask for one thing and return the body of the answer. Raises RtnetlinkError."""
        self._sequence += 1
        size = 16 + len(request.body)
        self._socket.send(HEADER.pack(size, request.kind, REQUEST, self._sequence, 0) + request.body)
        while True:
            for kind, flags, sequence, answer in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == _NLMSG_ERROR:
                    raise _error(request, flags, answer) or RtnetlinkError(errno.EIO, request.what)
                return answer

    def links(self) -> list[Link]:
        """All devices of the namespace."""
        return [parse_link(body) for body in self.listing(RTM_GETLINK, IFINFO.pack(0, 0, 0, 0, 0))]

    def addresses(self, index: int) -> set[tuple[IPAddress, int]]:
        """A device's addresses with their prefix lengths."""
        listed = map(parse_address, self.listing(RTM_GETADDR, IFADDR.pack(0, 0, 0, 0, index)))
        return {(address, length) for i, address, length in listed if i == index}

    def routes(self) -> list[Route]:
        """podwall's plain routes of the main table, both families."""
        filter_ = [ROUTE.pack(af, 0, 0, 0, 0, PROTOCOL, 0, 0, 0) for af in (socket.AF_INET, socket.AF_INET6)]
        bodies = [body for each in filter_ for body in self.listing(RTM_GETROUTE, each)]
        return [route for body in bodies if (route := parse_route(body)) and route.protocol == PROTOCOL]

    def neighbours(self) -> list[Neighbour]:
        """All permanent neighbour entries, both families."""
        filter_ = [NEIGHBOUR.pack(af, 0, 0, 0, 0) for af in (socket.AF_INET, socket.AF_INET6)]
        bodies = [body for each in filter_ for body in self.listing(RTM_GETNEIGH, each)]
        return [neighbour for body in bodies if (neighbour := parse_neighbour(body))]


def _error(request: Request, flags: int, body: bytes) -> RtnetlinkError | None:
    code = -int(struct.unpack_from("=i", body)[0])
    if not code:
        return None
    # NETLINK_CAP_ACK: behind the code stands the request's header alone, then the kernel's explanation.
    words = attributes(body, 20).get(1, b"") if flags & 0x200 else b""
    reason = os.strerror(code) + (f" ({_string(words)})" if words else "")
    return RtnetlinkError(code, f"cannot {request.what}: {reason}")
