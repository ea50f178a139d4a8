"""What a Pod's link is made of, in the kernel's terms.

    node's namespace                                     Pod's namespace
    podwallXXXXXXXX  host_mac                            eth0  mac, 10.244.1.5/32, fd00::5/128
      10.244.1.5 dev podwallXXXXXXXX scope link            169.254.1.1 dev eth0 scope link, default via it
      10.244.1.5 lladdr mac PERMANENT                      169.254.1.1 lladdr host_mac PERMANENT
      fd00::5 alike                                        default via fe80::1, alike

Neither end asks for a neighbour, listens to router advertisements or makes up an address, and no address
waits for duplicate detection: all of it is usable when `attach` returns. The pair is made from the node's
namespace with the peer born in the Pod's; the Pod's side is done by a thread that enters the namespace
with setns for that time. The node's namespace is the one this was made in; nothing here reads /sys, whose
mount may show another.

A link goes in two steps, because the kernel needs 16 ms to be rid of one or of a hundred: `retire` takes
it out of the datapath at once, `remove` deletes all retired ones together. A link's group tells retired
ones, also from the agent's former life.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from agent.pods import bandwidth, host_ports, rtnetlink
from agent.pods.model import GATEWAYS, LINK_NAME, SHAPER_NAME, Attachment, IPAddress, shaper_name
from agent.pods.rtnetlink import Link, Request, Rtnetlink, RtnetlinkError
from cni.spec import AttachmentKey, PortMapping

RETIRED = 0x706F6477  # "podw"
"""The group of links that wait for their removal."""

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_LOOPBACK = 1  # the first device of every namespace
IPV6_MTU_MIN = 1280
OPERATIONAL_LIMIT_S = 5.0
_OPERATIONAL_POLL_S = 0.0005
_THREADS = 2
_ALIAS_MAX = 255
_libc = ctypes.CDLL(None, use_errno=True)

_P = ParamSpec("_P")
_R = TypeVar("_R")


class WiringError(Exception):
    """The kernel refused, or the Pod's namespace cannot be used; the message says what and why."""


@dataclass(frozen=True, slots=True)
class FoundLink:
    """A Pod link that the kernel has, with what it tells of whose it is (None, "" where it does not)."""

    link: str
    retired: bool
    key: AttachmentKey | None
    pod_uid: str
    namespace: str
    pod: str
    addresses: tuple[IPAddress, ...]
    mac: str
    host_mac: str
    mtu: int
    up: bool
    port_mappings: tuple[PortMapping, ...] = ()


class Wiring:
    """Makes, checks and removes Pod links of the namespace of the thread that calls the constructor.

    `sysctl` is where the kernel's settings are mounted writable.
    """

    def __init__(self, sysctl: Path = Path("/proc/sys")) -> None:
        self._sysctl = sysctl
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._group_is_ours = False
        self._sockets: list[Rtnetlink] = []
        self._local = threading.local()
        self._workers = ThreadPoolExecutor(_THREADS, "podwall-wiring", self._begin_thread)
        self._remover = ThreadPoolExecutor(1, "podwall-remover", self._begin_thread)

    async def close(self) -> None:
        """Let the threads end. Links stay."""
        await asyncio.to_thread(self._workers.shutdown)
        await asyncio.to_thread(self._remover.shutdown)
        for each in self._sockets:
            each.close()
        os.close(self._home)

    async def attach(self, attachment: Attachment, netns: int) -> None:
        """Make the link with its end in the namespace of the descriptor. Raises WiringError.

        After an error some of it may be there: `retire` and `remove` it.
        """
        await self._in(self._workers, self._attach, attachment, netns)

    async def restore(self, attachment: Attachment) -> None:
        """Make the host's routes and neighbours anew where they are not as they were. Raises WiringError."""
        await self._in(self._workers, self._restore, attachment)

    async def check(self, attachment: Attachment, netns: int) -> list[str]:
        """Compare what is there with what was made; name each difference. Raises WiringError."""
        return await self._in(self._workers, self._check, attachment, netns)

    async def retire(self, links: Sequence[str]) -> None:
        """Take links out of the datapath and mark them for removal; those that are gone are no error.

        Raises WiringError.
        """
        await self._in(self._workers, self._retire, links)

    async def remove(self) -> None:
        """Delete the retired links; none is left when this returns. Raises WiringError."""
        await self._in(self._remover, self._remove)

    async def find(self) -> list[FoundLink]:
        """All Pod links of the node. Raises WiringError."""
        return await self._in(self._workers, self._find)

    async def retire_shapers(self, links: Collection[str]) -> None:
        """Retire the shaping devices that belong to none of these links. Raises WiringError."""
        await self._in(self._workers, self._retire_shapers, links)

    async def exists(self, link: str) -> bool:
        """Whether there is such a device, retired or not."""
        return await self._in(self._workers, lambda: _index(link) is not None)

    async def _in(
        self, pool: ThreadPoolExecutor, work: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        def whole() -> _R:
            try:
                return work(*args, **kwargs)
            except OSError as error:
                text = str(error) if isinstance(error, RtnetlinkError) else os.strerror(error.errno or 0)
                raise WiringError(text) from error

        return await asyncio.get_running_loop().run_in_executor(pool, whole)

    def _begin_thread(self) -> None:
        enter(self._home)  # the thread that happens to start this one may be elsewhere
        self._local.host = Rtnetlink()
        self._sockets.append(self._local.host)

    @property
    def _host(self) -> Rtnetlink:
        host: Rtnetlink = self._local.host
        return host

    @contextmanager
    def _inside(self, netns: int) -> Iterator[Rtnetlink]:
        """The calling thread is in that namespace, with a socket to its rtnetlink."""
        enter(netns)
        try:
            with Rtnetlink() as pod:
                yield pod
        finally:
            enter(self._home)

    # Making

    def _attach(self, attachment: Attachment, netns: int) -> None:
        self._verify(netns)
        a = attachment
        if a.mtu < IPV6_MTU_MIN and any(address.version == 6 for address in a.addresses):
            raise WiringError(f"MTU {a.mtu} is less than IPv6 needs ({IPV6_MTU_MIN})")
        pair = rtnetlink.new_veth(
            link=a.link, mac=a.host_mac, peer=a.ifname, peer_mac=a.mac, mtu=a.mtu, netns=netns
        )
        try:
            self._host.ask(pair)
        except RtnetlinkError as error:
            if error.errno == errno.EEXIST and _index(a.link) is None:
                raise WiringError(f"the Pod's namespace has an interface {a.ifname} already") from error
            raise
        host = _index(a.link)
        if host is None:
            raise WiringError(f"link {a.link} vanished: the Pod's namespace is gone")
        self._settle(a.link, a)
        self._host.ask(
            rtnetlink.without_own_addresses(a.link, host, _alias(a)), rtnetlink.set_up(a.link, host)
        )
        self._attach_inside(a, netns)
        if a.bandwidth:
            self._limit(a, host)
        # Last, so that a link with routes is a whole one, whoever finds it.
        self._host.ask(*_host_side(a, host))
        _wait_until_operational(self._host, host, a.link)

    def _attach_inside(self, a: Attachment, netns: int) -> None:
        with self._inside(netns) as pod:
            index = _index(a.ifname)
            if index is None:
                raise WiringError(f"interface {a.ifname} vanished from the Pod's namespace")
            self._settle(a.ifname, a)
            pod.ask(
                rtnetlink.without_own_addresses(a.ifname, index),
                rtnetlink.set_up(a.ifname, index),
                rtnetlink.set_up("lo", _LOOPBACK),
                *_pod_side(a, index),
            )
            _wait_until_operational(pod, index, a.ifname)
            _wait_until_own(pod, a.addresses)

    def _limit(self, a: Attachment, host: int) -> None:
        assert a.bandwidth
        limits = a.bandwidth
        try:
            if limits.ingress_rate:
                self._host.ask(bandwidth.limit(host, limits.ingress_rate, limits.ingress_burst, a.mtu))
            if limits.egress_rate:
                self._host.ask(rtnetlink.new_device(a.shaper, "ifb", a.mtu))
                shaper = socket.if_nametoindex(a.shaper)
                self._host.ask(
                    bandwidth.limit(shaper, limits.egress_rate, limits.egress_burst, a.mtu),
                    *bandwidth.redirect(host, shaper),
                )
        except RtnetlinkError as error:
            raise WiringError(
                f"{error}: bandwidth limits need sch_tbf, sch_ingress, cls_u32, act_mirred and ifb"
            ) from error

    def _restore(self, attachment: Attachment) -> None:
        host = _index(attachment.link)
        if host is None:
            raise WiringError(f"link {attachment.link} is gone")
        self._host.ask(rtnetlink.set_up(attachment.link, host), *_host_side(attachment, host, replace=True))

    def _settle(self, device: str, a: Attachment) -> None:
        """The settings of a device that rtnetlink does not know."""
        if any(address.version == 6 for address in a.addresses):
            self._set(device, "disable_ipv6", "0")
        self._set(device, "accept_ra", "0")

    def _set(self, device: str, setting: str, value: str) -> None:
        path = f"{self._sysctl}/net/ipv6/conf/{device}/{setting}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if setting == "disable_ipv6":
                raise WiringError(f"{path} is missing: the kernel runs without IPv6") from None
            return  # without IPv6 nothing is accepted
        except OSError as error:
            raise WiringError(f"{path} cannot be written ({error.strerror})") from error
        try:
            # Writing disable_ipv6 takes the kernel's big network lock, even where nothing changes.
            if os.read(fd, 16).strip() != value.encode():
                os.pwrite(fd, value.encode(), 0)
        finally:
            os.close(fd)

    def _verify(self, netns: int) -> None:
        """Refuse a descriptor that is no network namespace, and the node's own."""
        try:
            kind = fcntl.ioctl(netns, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != _CLONE_NEWNET:
            raise WiringError("CNI_NETNS is not a network namespace")
        if os.path.samestat(os.fstat(netns), os.fstat(self._home)):
            raise WiringError("CNI_NETNS is the node's own network namespace")

    # Removing

    def _retire(self, links: Sequence[str]) -> None:
        devices = [device for link in links for device in (link, shaper_name(link))]
        outcomes = self._host.outcomes(
            *(rtnetlink.set_down_into_group(device, RETIRED) for device in devices)
        )
        for error in outcomes:
            if error and error.errno != errno.ENODEV:
                raise error

    def _retire_shapers(self, links: Collection[str]) -> None:
        wanted = {shaper_name(link) for link in links}
        orphans = [
            link.name
            for link in self._host.links()
            if link.kind == "ifb" and SHAPER_NAME.fullmatch(link.name) and link.name not in wanted
        ]
        self._host.ask(*(rtnetlink.set_down_into_group(name, RETIRED) for name in orphans))

    def _remove(self) -> None:
        if not self._group_is_ours:
            self._refuse_foreign_links()
            self._group_is_ours = True
        (error,) = self._host.outcomes(rtnetlink.delete_group(RETIRED))
        if error and error.errno != errno.ENODEV:
            raise error

    def _refuse_foreign_links(self) -> None:
        """The group's number is as good as ours, but another's link must not go with it."""
        for link in self._host.links():
            if link.group == RETIRED and not link.name.startswith("podwall"):
                raise WiringError(f"device {link.name} is in link group {RETIRED:#x}, podwall's: move it out")

    # Looking

    def _check(self, a: Attachment, netns: int) -> list[str]:
        self._verify(netns)
        host = _listing(self._host, a.link)
        found = _differences(
            f"link {a.link}", host, _Expected(a.mtu, a.host_mac, _host_routes(a), _host_neighbours(a))
        )
        with self._inside(netns) as pod:
            inside = _listing(pod, a.ifname)
            expected = _Expected(a.mtu, a.mac, _pod_routes(a), _pod_neighbours(a))
            found += _differences(f"interface {a.ifname} in the Pod", inside, expected)
            if inside.link:
                held = pod.addresses(inside.link.device)
                wanted = [address for address in a.addresses if (address, address.max_prefixlen) not in held]
                found += [f"interface {a.ifname} in the Pod has lost address {each}" for each in wanted]
        if a.bandwidth and a.bandwidth.egress_rate and _index(a.shaper) is None:
            found.append(f"{a.shaper}, which limits what the Pod sends, is gone")
        return found

    def _find(self) -> list[FoundLink]:
        links = [link for link in self._host.links() if _is_pod_link(link)]
        addresses: dict[int, list[IPAddress]] = {}
        for route in self._host.routes():
            target, length = route.target
            if target and length == target.max_prefixlen and route.gateway is None:
                addresses.setdefault(route.device, []).append(target)
        macs = {neighbour.device: neighbour.mac for neighbour in self._host.neighbours()}
        return [_found(link, addresses.get(link.device, ()), macs.get(link.device, "")) for link in links]


@dataclass(frozen=True, slots=True)
class _Expected:
    mtu: int
    mac: str
    routes: Sequence[tuple[IPAddress | None, IPAddress | None]]
    neighbours: Mapping[IPAddress, str]


@dataclass(frozen=True, slots=True)
class _Side:
    link: Link | None
    routes: frozenset[tuple[IPAddress | None, IPAddress | None]]
    neighbours: Mapping[IPAddress, str]


def _wait_until_operational(kernel: Rtnetlink, index: int, name: str) -> None:
    """A link that is up drops what it shall send until the kernel's link watch has seen its carrier."""
    if not _within_limit(lambda: kernel.operational(index)):
        raise WiringError(f"link {name} has no carrier after {OPERATIONAL_LIMIT_S:.0f} s")


def _wait_until_own(kernel: Rtnetlink, addresses: Iterable[IPAddress]) -> None:
    """An IPv6 address is not answered for until the kernel's own work has its network lock for once.

    While links of other Pods are deleted that takes a while, and the answer to a first SYN would be dropped.
    """
    for address in addresses:
        if address.version == 6 and not _within_limit(partial(kernel.is_own, address)):
            raise WiringError(f"address {address} is not in use after {OPERATIONAL_LIMIT_S:.0f} s")


def _within_limit(reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + OPERATIONAL_LIMIT_S
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(_OPERATIONAL_POLL_S)
    return True


def _listing(kernel: Rtnetlink, name: str) -> _Side:
    link = next((each for each in kernel.links() if each.name == name), None)
    if link is None:
        return _Side(None, frozenset(), {})
    return _Side(
        link,
        frozenset((r.target[0], r.gateway) for r in kernel.routes() if r.device == link.device),
        {n.address: n.mac for n in kernel.neighbours() if n.device == link.device},
    )


def _differences(what: str, side: _Side, expected: _Expected) -> list[str]:
    if side.link is None:
        return [f"{what} is gone"]
    found = [] if side.link.up else [f"{what} is down"]
    if side.link.mtu != expected.mtu:
        found.append(f"{what} has MTU {side.link.mtu}, not {expected.mtu}")
    if side.link.mac != expected.mac:
        found.append(f"{what} has hardware address {side.link.mac}, not {expected.mac}")
    for target, gateway in expected.routes:
        if (target, gateway) not in side.routes:
            found.append(f"{what} has lost the route {target or f'default via {gateway}'}")
    for address, mac in expected.neighbours.items():
        if side.neighbours.get(address) != mac:
            found.append(f"{what} has lost the neighbour {address} at {mac}")
    return found


# What is made on each side; attach, restore and check are of one mind by these.


def _host_routes(a: Attachment) -> list[tuple[IPAddress | None, IPAddress | None]]:
    return [(address, None) for address in a.addresses]


def _host_neighbours(a: Attachment) -> dict[IPAddress, str]:
    return dict.fromkeys(a.addresses, a.mac)


def _pod_routes(a: Attachment) -> list[tuple[IPAddress | None, IPAddress | None]]:
    routes: list[tuple[IPAddress | None, IPAddress | None]] = []
    for address in a.addresses:
        gateway = GATEWAYS[address.version]
        if address.version == 4:  # IPv6 takes a link-local next hop to be on the link
            routes.append((gateway, None))
        routes.append((None, gateway))
    return routes


def _pod_neighbours(a: Attachment) -> dict[IPAddress, str]:
    return {GATEWAYS[address.version]: a.host_mac for address in a.addresses}


def _host_side(a: Attachment, device: int, *, replace: bool = False) -> list[Request]:
    neighbours = [rtnetlink.new_neighbour(ip, mac, device) for ip, mac in _host_neighbours(a).items()]
    routes = [
        rtnetlink.new_route(target, device, gateway, replace=replace) for target, gateway in _host_routes(a)
    ]
    return neighbours + routes


def _pod_side(a: Attachment, device: int) -> list[Request]:
    addresses = [rtnetlink.new_address(address, device) for address in a.addresses]
    neighbours = [rtnetlink.new_neighbour(ip, mac, device) for ip, mac in _pod_neighbours(a).items()]
    routes = [rtnetlink.new_route(target, device, gateway) for target, gateway in _pod_routes(a)]
    return addresses + neighbours + routes


# The link's alias: whose it is, for `ip link` and for an agent whose ledger is lost.


def _alias(a: Attachment) -> str:
    identity = f"{a.container_id} {a.ifname} {a.pod_uid or '-'}"
    named = f"{identity} {a.namespace}/{a.pod}"
    for alias in (f"{named} {host_ports.write(a.port_mappings)}".rstrip(), named, identity):
        if len(alias.encode()) <= _ALIAS_MAX:
            return alias
    return ""


def _found(link: Link, addresses: Iterable[IPAddress], mac: str) -> FoundLink:
    words = link.alias.split(" ")
    named = len(words) in (3, 4, 5)
    namespace, _, pod = words[3].partition("/") if len(words) in (4, 5) else ("", "", "")
    mappings: tuple[PortMapping, ...] = ()
    with suppress(ValueError):  # somebody else wrote the alias
        mappings = host_ports.read(words[4]) if len(words) == 5 else ()
    return FoundLink(
        link=link.name,
        retired=link.group == RETIRED,
        key=AttachmentKey(words[0], words[1]) if named else None,
        pod_uid=words[2] if named and words[2] != "-" else "",
        namespace=namespace,
        pod=pod,
        addresses=tuple(sorted(addresses, key=lambda address: address.version)),
        mac=mac,
        host_mac=link.mac,
        mtu=link.mtu,
        up=link.up,
        port_mappings=mappings,
    )


def _is_pod_link(link: Link) -> bool:
    return link.kind == "veth" and LINK_NAME.fullmatch(link.name) is not None


def _index(name: str) -> int | None:
    """The number of a device in the calling thread's namespace."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def enter(netns: int) -> None:
    """Move the calling thread into a network namespace, given by descriptor. Raises OSError."""
    if _libc.setns(netns, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")
