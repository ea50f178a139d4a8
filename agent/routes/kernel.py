"""Routes between nodes in the kernel: reads podwall's own, changes only what differs, finds the uplink.

Own are: routes of the main table with protocol 112 that have a gateway or are unreachable (those without are
Pods' links), and everything on podwall-vxlan.  All else is read at most to say that it is in the way.  One
thread does it, in the network namespace of whoever made the RouteKernel, so that a listing of thousands of
routes does not hold up the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent.cluster.model import IPAddress
from agent.pods.rtnetlink import (
    IFINFO,
    RTM_GETLINK,
    Link,
    Request,
    Rtnetlink,
    RtnetlinkError,
    parse_address,
    parse_link,
    set_up,
    without_own_addresses,
)
from agent.pods.wiring import enter
from agent.routes import messages
from agent.routes.diff import Item, Present, Step, conflicts, steps
from agent.routes.plan import VXLAN_DEVICE, Forwarding, Neighbour, Plan, Route, Uplink, Vxlan

_T = TypeVar("_T")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_GONE = {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL}
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # link, addresses and routes of both families


class RouteError(Exception):
    """The kernel cannot be read, or there is no uplink; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a sync did, and what it could not do, as sentences for people; others went on."""

    done: tuple[Step, ...] = ()
    problems: tuple[str, ...] = ()


class RouteKernel:
    """The routing tables of the calling thread's network namespace; settings are written under `sysctl`."""

    def __init__(self, sysctl: Path = Path("/proc/sys")) -> None:
        self._sysctl = sysctl
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(1, "podwall-routes", self._begin_thread)
        self._rtnetlink: Rtnetlink | None = None

    async def close(self) -> None:
        """Let the thread end. Routes stay."""
        await asyncio.to_thread(self._thread.shutdown)
        if self._rtnetlink:
            self._rtnetlink.close()
        os.close(self._home)

    async def sync(self, plan: Plan) -> Changes:
        """Make the kernel as planned. Raises RouteError when it cannot be read."""
        return await self._in_thread(lambda: self._sync(plan))

    async def read(self, plan: Plan | None = None) -> Present:
        """podwall's own entries, and foreign routes to planned destinations. Raises RouteError."""
        return await self._in_thread(lambda: self._read(plan or Plan()))

    async def uplink(self, node_ips: Sequence[IPAddress]) -> Uplink:
        """The interface that holds the first of the Node's InternalIPs that any does.

        Where the address is on the loopback device it is the default route's. Raises RouteError.
        """
        return await self._in_thread(lambda: self._uplink(node_ips))

    async def local_addresses(self) -> frozenset[IPAddress]:
        """Every address of this node, on any interface. Raises RouteError."""
        return await self._in_thread(lambda: frozenset(ip for _, ip in self._addresses()))

    async def changes(self) -> AsyncIterator[None]:
        """Yield after anything changed that routes between nodes depend on; whoever asks then syncs."""
        watch = await self._in_thread(_watch)
        heard = asyncio.Event()
        loop = asyncio.get_running_loop()
        pods: messages.Names = {}
        loop.add_reader(watch, _drain, watch, heard, pods)
        try:
            while True:
                await heard.wait()
                heard.clear()
                yield
        finally:
            loop.remove_reader(watch)
            watch.close()

    def _begin_thread(self) -> None:
        enter(self._home)
        self._rtnetlink = Rtnetlink()

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            raise RouteError(f"the routing tables cannot be read: {error}") from error

    @property
    def _kernel(self) -> Rtnetlink:
        assert self._rtnetlink is not None
        return self._rtnetlink

    # Reading

    def _links(self) -> list[tuple[bytes, Link]]:
        return [(body, parse_link(body)) for body in self._kernel.listing(RTM_GETLINK, bytes(IFINFO.size))]

    def _addresses(self) -> list[tuple[int, IPAddress]]:
        return [parse_address(body)[:2] for body in self._kernel.listing(*messages.address_listing())]

    def _routes(self) -> list[bytes]:
        return [body for af in _FAMILIES for body in self._kernel.listing(*messages.route_listing(af))]

    def _read(self, plan: Plan) -> Present:
        links = self._links()
        names = {link.device: link.name for _, link in links}
        wanted = {messages.destination_key(route.destination) for route in plan.routes}
        own, foreign = messages.parse_routes(self._routes(), names, wanted)
        for body, link in links:
            if link.name == VXLAN_DEVICE:
                addresses = frozenset(
                    ip for ip, length in self._kernel.addresses(link.device) if length == ip.max_prefixlen
                )
                return Present(
                    routes=frozenset(own),
                    foreign=foreign,
                    vxlan=messages.parse_vxlan(body, link, addresses),
                    neighbours=self._neighbours(link.device),
                    forwarding=messages.parse_forwarding(
                        self._kernel.listing(*messages.neighbour_listing(socket.AF_BRIDGE, link.device)),
                        link.device,
                    ),
                )
        return Present(routes=frozenset(own), foreign=foreign)

    def _neighbours(self, index: int) -> frozenset[Neighbour]:
        bodies = [
            body for af in _FAMILIES for body in self._kernel.listing(*messages.neighbour_listing(af, index))
        ]
        return messages.parse_neighbours(bodies, index)

    def _uplink(self, node_ips: Sequence[IPAddress]) -> Uplink:
        links = {link.device: link for _, link in self._links()}
        addresses = self._addresses()
        routes = self._routes()
        holders = {ip: index for index, ip in addresses if not links[index].name.startswith("podwall")}
        index = next((holders[ip] for ip in node_ips if ip in holders), 0)
        if index in links and links[index].name == "lo":
            index = messages.parse_default_device(routes)
        if index not in links:
            known = ", ".join(map(str, node_ips)) or "none"
            raise RouteError(
                f"no interface holds the Node's InternalIP ({known}); "
                f"set kubelet's --node-ip to an address of this machine"
            )
        local = {ip for ip in node_ips if ip in holders and links[holders[ip]].name == "lo"}
        held = [ip for device, ip in addresses if device == index or ip in local]
        return Uplink(
            name=links[index].name,
            index=index,
            mtu=links[index].mtu,
            addresses=tuple(sorted(held, key=lambda ip: (ip.version, int(ip)))),
            subnets=tuple(sorted(set(messages.parse_connected(routes, index)), key=str)),
        )

    # Changing

    def _sync(self, plan: Plan) -> Changes:
        present = self._read(plan)
        done: list[Step] = []
        problems = list(conflicts(plan, present))
        todo = steps(plan, present)
        before, after = _split(todo)
        for step in before:
            self._try(step, done, problems)
        self._batch(after, done, problems)
        for step in todo[len(before) + len(after) :]:
            self._try(step, done, problems)
        return Changes(tuple(done), tuple(problems))

    def _batch(self, batch: Sequence[Step], done: list[Step], problems: list[str]) -> None:
        ready = [(step, request) for step in batch if (request := _request(step))]
        outcomes = self._kernel.outcomes(*(request for _, request in ready))
        for (step, _), error in zip(ready, outcomes, strict=True):
            _note(step, error, done, problems)

    def _try(self, step: Step, done: list[Step], problems: list[str]) -> None:
        assert isinstance(step.item, Vxlan)
        try:
            self._device(step.action, step.item)
        except RtnetlinkError as error:
            _note(step, error, done, problems)
        else:
            _note(step, None, done, problems)

    def _device(self, action: str, vxlan: Vxlan) -> None:
        if action == "delete":
            self._kernel.ask(messages.delete_device(_index(VXLAN_DEVICE)))
            return
        if action == "create":
            self._kernel.ask(messages.new_vxlan(vxlan))
        index = _index(VXLAN_DEVICE)
        self._no_own_addresses(index)
        self._kernel.ask(messages.set_mtu(index, vxlan.mtu), set_up(VXLAN_DEVICE, index))
        held = {ip for ip, length in self._kernel.addresses(index) if length == ip.max_prefixlen}
        self._kernel.ask(
            *(
                messages.address_request(ip, "create", index)
                for ip in sorted(vxlan.addresses - held, key=str)
            ),
            *(
                messages.address_request(ip, "delete", index)
                for ip in sorted(held - vxlan.addresses, key=str)
            ),
        )

    def _no_own_addresses(self, index: int) -> None:
        """No link-local address, and IPv6 on, where the kernel has IPv6 at all."""
        error = self._kernel.outcomes(without_own_addresses(VXLAN_DEVICE, index))[0]
        if error and error.errno != errno.EAFNOSUPPORT:
            raise error
        # A packet may come by the tunnel while its source is still routed past it, so no strict source check.
        self._setting(f"net/ipv4/conf/{VXLAN_DEVICE}/rp_filter", "2")
        self._setting(f"net/ipv6/conf/{VXLAN_DEVICE}/disable_ipv6", "0")

    def _setting(self, name: str, value: str) -> None:
        path = self._sysctl / name
        with contextlib.suppress(OSError):  # what IPv6 lacks is refused by name when an address is given
            if path.read_text().strip() != value:
                path.write_text(value)


def _split(todo: Sequence[Step]) -> tuple[Sequence[Step], Sequence[Step]]:
    """The device's steps at the front, and those of entries and routes; the rest is the device's again."""
    entries = [at for at, step in enumerate(todo) if not isinstance(step.item, Vxlan)]
    if not entries:
        return todo, ()
    return todo[: entries[0]], todo[entries[0] : entries[-1] + 1]


def _request(step: Step) -> Request | None:
    """The message of a step; None when its device is not there, which is reported already."""
    item: Item = step.item
    if isinstance(item, Route):
        index = _index(item.device) if item.device else 0
        return messages.route_request(item, step.action, index) if index or not item.device else None
    index = _index(VXLAN_DEVICE)
    if not index:
        return None
    if isinstance(item, Neighbour):
        return messages.neighbour_request(item, step.action, index)
    assert isinstance(item, Forwarding)
    return messages.forwarding_request(item, step.action, index)


def _note(step: Step, error: RtnetlinkError | None, done: list[Step], problems: list[str]) -> None:
    if error is None:
        done.append(step)
    elif step.action != "delete" or error.errno not in _GONE:
        problems.append(str(error) + _remedy(step.item, error))


def _remedy(item: Item, error: RtnetlinkError) -> str:
    if isinstance(item, Vxlan) and error.errno in (errno.EEXIST, errno.EADDRINUSE):
        return f"; see who has VXLAN {item.vxlan_id} and UDP port {item.port}: ip -d link show type vxlan"
    if isinstance(item, Vxlan) and error.errno == errno.EOPNOTSUPP:
        return "; the kernel has no VXLAN (modprobe vxlan), use mode direct where nodes share a link"
    if isinstance(item, Route) and error.errno == errno.EEXIST:
        return f"; a foreign route has the destination: see `ip route show {item.destination}`"
    return ""


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _watch() -> socket.socket:
    watch = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    )
    watch.bind((0, _GROUPS))
    return watch


def _drain(watch: socket.socket, heard: asyncio.Event, pods: messages.Names) -> None:
    """Empty the socket; what changed is read anew, so a lost message (ENOBUFS) loses nothing."""
    while True:
        try:
            data = watch.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            heard.set()
        else:
            if messages.matters(data, pods):
                heard.set()


__all__ = ["Changes", "RouteError", "RouteKernel"]
