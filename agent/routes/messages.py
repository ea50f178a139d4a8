"""Routes, neighbours and the VXLAN device as rtnetlink messages, both ways; no socket.

Layouts: linux/rtnetlink.h, linux/neighbour.h, linux/if_link.h (IFLA_VXLAN_*).
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Set
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from agent.cluster.model import IPAddress, IPNetwork
from agent.pods.rtnetlink import (
    CREATE,
    EXCLUDE,
    HEADER,
    IFADDR,
    IFINFO,
    NEIGHBOUR,
    NUD_PERMANENT,
    PROTOCOL,
    REPLACE,
    ROUTE,
    RTM_DELLINK,
    RTM_GETADDR,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_SETLINK,
    TABLE_MAIN,
    Link,
    Request,
    attribute,
    attributes,
    family,
    mac_bytes,
    nest,
    number,
    text,
)
from agent.routes.plan import VXLAN_DEVICE, Forwarding, Neighbour, Route, Vxlan

RTM_DELADDR, RTM_DELROUTE, RTM_DELNEIGH = 21, 25, 29

Names = dict[int, str]
Destination = tuple[int, int, bytes]  # family, prefix length, address: a route's key without making objects

_UNICAST, _UNREACHABLE = 1, 7
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE, _RTA_VIA = 1, 4, 5, 15, 18
_RTNH_F_ONLINK, _RTM_F_CLONED = 4, 0x200
_SCOPE_ANY = 255
_NDA_DST, _NDA_LLADDR, _NDA_PROTOCOL = 1, 2, 12
_NUD_NOARP, _NTF_SELF = 0x40, 0x02
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x02, 0x200
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO = 1, 3, 4, 18
_INFO_KIND, _INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_LOCAL, _VXLAN_LEARNING, _VXLAN_PORT, _VXLAN_LOCAL6 = 1, 4, 7, 15, 17


# Routes


def route_request(route: Route, action: str, index: int) -> Request:
    """Create, replace or delete a route; deletion names the protocol, so it cannot hit a foreign one."""
    destination = route.destination
    delete = action == "delete"
    header = ROUTE.pack(
        family(destination.network_address),
        destination.prefixlen,
        0,
        0,
        TABLE_MAIN,
        PROTOCOL,
        _SCOPE_ANY if delete else 0,
        _UNREACHABLE if route.gateway is None else _UNICAST,
        _RTNH_F_ONLINK if route.onlink else 0,
    )
    body = header + attribute(_RTA_DST, destination.network_address.packed) + _next_hop(route, index)
    if delete:
        return Request(RTM_DELROUTE, 0, body, f"delete route {route}")
    flags = CREATE | (REPLACE if action == "replace" else EXCLUDE)
    return Request(RTM_NEWROUTE, flags, body, f"{action} route {route}")


def _next_hop(route: Route, index: int) -> bytes:
    if route.gateway is None:
        return b""
    if route.gateway.version == route.destination.version:
        return attribute(_RTA_GATEWAY, route.gateway.packed) + number(_RTA_OIF, index)
    via = struct.pack("=H", family(route.gateway)) + route.gateway.packed
    return attribute(_RTA_VIA, via) + number(_RTA_OIF, index)


def route_listing(af: int) -> tuple[int, bytes]:
    """The request for the main table of one family, sorted out by the kernel."""
    return RTM_GETROUTE, ROUTE.pack(af, 0, 0, 0, TABLE_MAIN, 0, 0, 0, 0)


def destination_key(network: IPNetwork) -> Destination:
    return family(network.network_address), network.prefixlen, network.network_address.packed


def parse_routes(
    bodies: list[bytes], names: Names, wanted: Set[Destination]
) -> tuple[set[Route], dict[IPNetwork, str]]:
    """Read podwall's routes between nodes, and the foreign ones that have a wanted destination.

    A Pod's own route has protocol 112 as well, but no gateway; it is nobody's business here.
    """
    own: set[Route] = set()
    foreign: dict[IPNetwork, str] = {}
    for body in bodies:
        af, length, _, _, table, protocol, _, kind, flags = ROUTE.unpack_from(body)
        if flags & _RTM_F_CLONED or table != TABLE_MAIN:
            continue
        values = attributes(body, ROUTE.size)
        packed = values.get(_RTA_DST, bytes(4 if af == socket.AF_INET else 16))
        if protocol != PROTOCOL:
            if (af, length, packed) in wanted:
                network = ip_network((packed, length))
                foreign[network] = _words(network, values, names, protocol)
        elif kind in (_UNICAST, _UNREACHABLE):
            gateway = _gateway(values)
            if kind == _UNREACHABLE:
                own.add(Route(ip_network((packed, length))))
            elif gateway is not None:
                device = names.get(_number(values.get(_RTA_OIF, bytes(4))), "")
                own.add(Route(ip_network((packed, length)), gateway, device, bool(flags & _RTNH_F_ONLINK)))
    return own, foreign


def parse_connected(bodies: list[bytes], index: int) -> list[IPNetwork]:
    """The subnets that are on a device's own link: unicast routes without a gateway, whoever made them."""
    found = []
    for body in bodies:
        af, length, _, _, table, protocol, _, kind, flags = ROUTE.unpack_from(body)
        values = attributes(body, ROUTE.size)
        plain = (
            kind == _UNICAST and table == TABLE_MAIN and not flags & _RTM_F_CLONED and protocol != PROTOCOL
        )
        if plain and _gateway(values) is None and length and _number(values.get(_RTA_OIF, bytes(4))) == index:
            found.append(ip_network((values.get(_RTA_DST, bytes(4 if af == socket.AF_INET else 16)), length)))
    return found


def parse_default_device(bodies: list[bytes]) -> int:
    """The device of the first default route; 0 when there is none."""
    for body in bodies:
        _, length, _, _, table, _, _, kind, flags = ROUTE.unpack_from(body)
        values = attributes(body, ROUTE.size)
        if (
            not length
            and kind == _UNICAST
            and table == TABLE_MAIN
            and not flags & _RTM_F_CLONED
            and _RTA_OIF in values
        ):
            return _number(values[_RTA_OIF])
    return 0


def _gateway(values: dict[int, bytes]) -> IPAddress | None:
    if _RTA_GATEWAY in values:
        return ip_address(values[_RTA_GATEWAY])
    return ip_address(values[_RTA_VIA][2:]) if _RTA_VIA in values else None


def _words(network: IPNetwork, values: dict[int, bytes], names: Names, protocol: int) -> str:
    gateway = _gateway(values)
    via = f" via {gateway}" if gateway else ""
    device = names.get(_number(values.get(_RTA_OIF, bytes(4))))
    return f"{network}{via}{f' dev {device}' if device else ''} proto {protocol}"


# Entries of the VXLAN device


def neighbour_request(neighbour: Neighbour, action: str, index: int) -> Request:
    """Set or delete a permanent neighbour."""
    address = neighbour.address
    body = NEIGHBOUR.pack(family(address), index, NUD_PERMANENT, 0, 0) + attribute(_NDA_DST, address.packed)
    if action == "delete":
        return Request(RTM_DELNEIGH, 0, body, f"delete {neighbour}")
    body += attribute(_NDA_LLADDR, mac_bytes(neighbour.mac)) + attribute(_NDA_PROTOCOL, bytes((PROTOCOL,)))
    return Request(RTM_NEWNEIGH, CREATE | REPLACE, body, f"set {neighbour}")


def forwarding_request(entry: Forwarding, action: str, index: int) -> Request:
    """Set or delete the node a MAC's frames go to."""
    body = NEIGHBOUR.pack(socket.AF_BRIDGE, index, NUD_PERMANENT | _NUD_NOARP, _NTF_SELF, 0)
    body += attribute(_NDA_LLADDR, mac_bytes(entry.mac)) + attribute(_NDA_DST, entry.underlay.packed)
    if action == "delete":
        return Request(RTM_DELNEIGH, 0, body, f"delete {entry}")
    return Request(RTM_NEWNEIGH, CREATE | REPLACE, body, f"set {entry}")


def neighbour_listing(af: int, index: int) -> tuple[int, bytes]:
    """The request for a device's neighbours of one family, or (AF_BRIDGE) its forwarding entries."""
    if af == socket.AF_BRIDGE:
        return RTM_GETNEIGH, NEIGHBOUR.pack(af, index, 0, 0, 0)
    return RTM_GETNEIGH, NEIGHBOUR.pack(af, 0, 0, 0, 0) + number(8, index)  # NDA_IFINDEX


def parse_neighbours(bodies: list[bytes], index: int) -> frozenset[Neighbour]:
    """The permanent neighbours of a device."""
    found = set()
    for body in bodies:
        _, device, state, _, _ = NEIGHBOUR.unpack_from(body)
        values = attributes(body, NEIGHBOUR.size)
        if device == index and state & NUD_PERMANENT and _NDA_DST in values:
            found.add(Neighbour(ip_address(values[_NDA_DST]), values.get(_NDA_LLADDR, b"").hex(":")))
    return frozenset(found)


def parse_forwarding(bodies: list[bytes], index: int) -> frozenset[Forwarding]:
    """The forwarding entries of a device."""
    found = set()
    for body in bodies:
        _, device, _, _, _ = NEIGHBOUR.unpack_from(body)
        values = attributes(body, NEIGHBOUR.size)
        if device == index and _NDA_DST in values and _NDA_LLADDR in values:
            found.add(Forwarding(values[_NDA_LLADDR].hex(":"), ip_address(values[_NDA_DST])))
    return frozenset(found)


# The device


def new_vxlan(vxlan: Vxlan) -> Request:
    """Make the device, down: the kernel must not make up a link-local address before it is told not to.

    It has no lower device, so it outlives the uplink, and learns nothing: only Nodes say where a MAC is.
    """
    local = (
        attribute(_VXLAN_LOCAL, vxlan.local.packed)
        if isinstance(vxlan.local, IPv4Address)
        else attribute(_VXLAN_LOCAL6, vxlan.local.packed)
    )
    data = nest(
        _INFO_DATA,
        number(_VXLAN_ID, vxlan.vxlan_id),
        local,
        attribute(_VXLAN_PORT, struct.pack("!H", vxlan.port)),
        attribute(_VXLAN_LEARNING, b"\0"),
    )
    body = IFINFO.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, VXLAN_DEVICE)
    body += attribute(_IFLA_ADDRESS, mac_bytes(vxlan.mac)) + number(_IFLA_MTU, vxlan.mtu)
    body += nest(_IFLA_LINKINFO, text(_INFO_KIND, "vxlan"), data)
    return Request(RTM_NEWLINK, CREATE | EXCLUDE, body, f"make {vxlan}")


def set_mtu(index: int, mtu: int) -> Request:
    return Request(
        RTM_SETLINK,
        0,
        IFINFO.pack(0, 0, index, 0, 0) + number(_IFLA_MTU, mtu),
        f"set MTU {mtu} of {VXLAN_DEVICE}",
    )


def delete_device(index: int) -> Request:
    return Request(RTM_DELLINK, 0, IFINFO.pack(0, 0, index, 0, 0), f"delete {VXLAN_DEVICE}")


def address_request(address: IPAddress, action: str, index: int) -> Request:
    """Give or take a tunnel address: whole, usable at once, without a route of its own."""
    flags = _IFA_F_NODAD | _IFA_F_NOPREFIXROUTE
    body = IFADDR.pack(family(address), address.max_prefixlen, _IFA_F_NODAD, 0, index)
    body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
    if action == "delete":
        return Request(RTM_DELADDR, 0, body, f"take {address} from {VXLAN_DEVICE}")
    body += number(_IFA_FLAGS, flags)
    return Request(RTM_NEWADDR, CREATE | REPLACE, body, f"give {VXLAN_DEVICE} {address}")


def address_listing() -> tuple[int, bytes]:
    return RTM_GETADDR, IFADDR.pack(0, 0, 0, 0, 0)


def parse_vxlan(body: bytes, link: Link, addresses: frozenset[IPAddress]) -> Vxlan:
    """Read the device; one that is not as podwall makes it gets an identity that no plan has."""
    information = attributes(attributes(body, IFINFO.size).get(_IFLA_LINKINFO, b""))
    data = attributes(information.get(_INFO_DATA, b""))
    local: IPAddress = IPv4Address(0)
    if _VXLAN_LOCAL in data:
        local = IPv4Address(data[_VXLAN_LOCAL])
    elif _VXLAN_LOCAL6 in data:
        local = IPv6Address(data[_VXLAN_LOCAL6])
    ours = link.kind == "vxlan" and data.get(_VXLAN_LEARNING) == b"\0"
    return Vxlan(
        vxlan_id=_number(data[_VXLAN_ID]) if ours else 0,
        port=int.from_bytes(data.get(_VXLAN_PORT, b""), "big"),
        local=local,
        mac=link.mac,
        mtu=link.mtu,
        addresses=addresses,
        up=link.up,
    )


def _number(value: bytes) -> int:
    return int(struct.unpack("=I", value)[0])


# Notifications

_POD_LINK = re.compile(rb"podwalli?[0-9a-f]{7,8}\0?")
_LINK_EVENTS, _ADDRESS_EVENTS = (RTM_NEWLINK, RTM_DELLINK), (RTM_NEWADDR, RTM_DELADDR)


def matters(data: bytes, names: Names) -> bool:
    """Whether notifications may concern routes between nodes; Pods' links come and go all the time.

    `names` are the devices whose addresses matter not; those of Pods' links are added here.
    """
    found = False
    offset = 0
    while offset + HEADER.size <= len(data):
        size, kind, _, _, _ = HEADER.unpack_from(data, offset)
        found = _matters(kind, data[offset + HEADER.size : offset + size], names) or found
        offset += max(HEADER.size, (size + 3) & ~3)
    return found


def _matters(kind: int, body: bytes, pods: Names) -> bool:
    if kind in _LINK_EVENTS:
        index = struct.unpack_from("=i", body, 4)[0]
        name = attributes(body, IFINFO.size).get(_IFLA_IFNAME, b"")
        if _POD_LINK.fullmatch(name):
            pods[index] = name.rstrip(b"\0").decode()
            if kind == RTM_DELLINK:
                del pods[index]
            return False
        return True
    if kind in _ADDRESS_EVENTS:
        return struct.unpack_from("=I", body, 4)[0] not in pods
    _, _, _, _, table, protocol, _, type_, flags = ROUTE.unpack_from(body)
    if table != TABLE_MAIN or flags & _RTM_F_CLONED:
        return False
    if protocol == PROTOCOL:  # what podwall made is as it should be; what it made and is gone may not be
        gateway = _gateway(attributes(body, ROUTE.size)) is not None
        return kind == RTM_DELROUTE and (gateway or type_ == _UNREACHABLE)
    return True
