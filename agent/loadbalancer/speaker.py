"""Answers for LoadBalancer addresses on the uplink: the only file here that touches packets.

    client's "who has 192.0.2.200?" --uplink--> packet socket, filter --> frames --> "at this node's MAC"
    client's packet to 192.0.2.200  --uplink--> prerouting: DNAT --> Pod         (table inet podwall_services)

The address is on no interface, so the kernel does not answer for it, and neither does a node that only has
the rules. An answer is sent only while the Lease is held: that is asked for each one, at the moment of
sending, by the clock, so that an agent that was stopped and wakes up late is silent.

For IPv6 a node joins the address's solicited-node group on the uplink. The kernel reports that to switches
(MLD), and the network card lets the group's frames in; the kernel itself does not answer them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address

from agent import metrics
from agent.cluster.model import IPAddress
from agent.loadbalancer import filters, frames

ANNOUNCED_AT_S = (0.0, 0.5, 1.5, 3.5)
"""Seconds after taking an address at which everybody on the link is told: a single frame may be lost."""

_ARPHRD_ETHER = 1
_SO_ATTACH_FILTER = 26
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_MOST_AT_ONCE = 64  # frames read before others have their turn
_FRAME = 256
_FULL = {errno.ENOMEM, errno.ENOBUFS}  # a socket can be in some hundreds of groups (net.core.optmem_max)
_FOR_US = {socket.PACKET_HOST, socket.PACKET_BROADCAST, socket.PACKET_MULTICAST}

log = logging.getLogger(__name__)


class SpeakerError(Exception):
    """Nobody can answer on this link; the message says why."""


class Speaker:
    """Answers on one Ethernet link, in the network namespace and event loop that it was made in.

    `may_answer` is asked before each frame that is sent.
    """

    def __init__(self, link: str, may_answer: Callable[[IPAddress], bool]) -> None:
        """Raises SpeakerError."""
        self.link = link
        self._may_answer = may_answer
        self._addresses: frozenset[IPAddress] = frozenset()
        self._rivals: set[tuple[IPAddress, bytes]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._sockets: dict[int, socket.socket] = {}
        self._groups: _Groups | None = None
        try:
            self._index = socket.if_nametoindex(link)
            self._sockets = {4: _open(link), 6: _open(link)}
            self._groups = _Groups(self._index)
            if self._sockets[4].getsockname()[3] != _ARPHRD_ETHER:
                raise SpeakerError(f"uplink {link} is no Ethernet link: nobody asks there for addresses")
        except OSError as error:
            self.close()
            raise SpeakerError(f"cannot answer for addresses on uplink {link}: {error}") from error
        except SpeakerError:
            self.close()
            raise
        for each in self._sockets.values():
            asyncio.get_running_loop().add_reader(each, self._receive, each)

    def close(self) -> None:
        """Be silent, and leave all groups."""
        for timer in self._timers:
            timer.cancel()
        for each in self._sockets.values():
            if each.fileno() >= 0:
                with contextlib.suppress(RuntimeError):
                    asyncio.get_running_loop().remove_reader(each)
            each.close()
        if self._groups:
            self._groups.close()

    @property
    def addresses(self) -> frozenset[IPAddress]:
        """What it answers for, when it may."""
        return self._addresses

    def speak_for(self, addresses: frozenset[IPAddress]) -> None:
        """Answer for these addresses alone from now on; those that are new are announced."""
        new, self._addresses = addresses - self._addresses, addresses
        four, six = _by_family(addresses)
        self._hear_of(4, frames.ETH_ARP, filters.arp(four) if four else filters.nothing())
        self._hear_of(6, frames.ETH_IPV6, filters.solicitations(six) if six else filters.nothing())
        assert self._groups is not None
        self._groups.be_in({frames.solicited_node(ip) for ip in six})
        self._rivals = {(ip, mac) for ip, mac in self._rivals if ip in addresses}
        if new:
            for seconds in ANNOUNCED_AT_S:
                self._announce_in(seconds, new)

    def _hear_of(self, family: int, kind: int, code: bytes) -> None:
        """Let the filter's frames through; a family without addresses costs the kernel nothing at first."""
        _attach(self._sockets[family], code)
        if code != filters.nothing():
            self._sockets[family].bind((self.link, kind))

    # Announcing

    def _announce_in(self, seconds: float, addresses: frozenset[IPAddress]) -> None:
        if not seconds:
            self._announce(addresses)
            return
        self._timers = {timer for timer in self._timers if timer.when() > asyncio.get_running_loop().time()}
        self._timers.add(asyncio.get_running_loop().call_later(seconds, self._announce, addresses))

    def _announce(self, addresses: frozenset[IPAddress]) -> None:
        for ip in sorted(addresses & self._addresses, key=int):
            for frame in frames.announcements(ip, self._mac(ip.version)):
                if not self._send(ip, frame):
                    return

    # Answering

    def _receive(self, ready: socket.socket) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                frame, (_, _, kind, *_) = ready.recvfrom(_FRAME)
            except BlockingIOError:
                return
            except OSError as error:  # the link is down or gone: the uplink is looked for anew elsewhere
                log.warning("event=speaker-deaf link=%s error=%r", self.link, str(error))
                return
            if kind in _FOR_US:
                self._hear(frame)

    def _hear(self, frame: bytes) -> None:
        heard = frames.read(frame)
        if isinstance(heard, frames.Asked) and heard.target in self._addresses:
            mac = self._mac(heard.target.version)
            if self._send(heard.target, frames.answer(heard, mac)):
                metrics.LOAD_BALANCER_ANSWERS.labels(str(heard.target.version)).inc()
        elif isinstance(heard, frames.Claimed) and heard.address in self._addresses:
            self._notice_rival(heard)

    def _notice_rival(self, heard: frames.Claimed) -> None:
        """Somebody else on the link answers for an address that is ours: clients will reach either."""
        seen = (heard.address, heard.mac)
        if heard.mac == self._mac(4) or seen in self._rivals or not self._may_answer(heard.address):
            return
        self._rivals.add(seen)
        metrics.LOAD_BALANCER_RIVALS.inc()
        log.error(
            "event=address-rival address=%s mac=%s link=%s", heard.address, heard.mac.hex(":"), self.link
        )

    def _send(self, ip: IPAddress, frame: bytes) -> bool:
        if not self._may_answer(ip):
            return False
        try:
            self._sockets[ip.version].send(frame)
        except OSError as error:
            log.warning("event=speaker-mute link=%s address=%s error=%r", self.link, ip, str(error))
            return False
        return True

    def _mac(self, family: int) -> bytes:
        """The link's address as it is now: a bond may change it."""
        mac: bytes = self._sockets[family].getsockname()[4]
        return mac


def has_carrier(link: str) -> bool:
    """Whether the link is up and has somebody at its other end; no for one that is gone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asker:
        request = struct.pack("@16sH22x", link.encode(), 0)
        try:
            flags = struct.unpack("@16sH22x", fcntl.ioctl(asker, _SIOCGIFFLAGS, request))[1]
        except OSError:
            return False
    return bool(flags & _IFF_RUNNING)


class _Groups:
    """Memberships of multicast groups on one link."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._sockets: list[socket.socket] = []
        self._joined: dict[IPv6Address, socket.socket] = {}

    def be_in(self, wanted: set[IPv6Address]) -> None:
        """Be in these groups and no others; what the kernel refuses is logged."""
        for group in self._joined.keys() - wanted:
            sock = self._joined.pop(group)
            with contextlib.suppress(OSError):  # the link is gone, and the membership with it
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_LEAVE_GROUP, self._request(group))
        for group in sorted(wanted - self._joined.keys()):
            try:
                self._join(group)
            except OSError as error:
                log.error("event=group-not-joined group=%s error=%r", group, str(error))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def _join(self, group: IPv6Address) -> None:
        if not self._sockets:
            self._open()
        try:
            self._join_on(self._sockets[-1], group)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._open()
            self._join_on(self._sockets[-1], group)

    def _open(self) -> None:
        self._sockets.append(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))

    def _join_on(self, sock: socket.socket, group: IPv6Address) -> None:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, self._request(group))
        self._joined[group] = sock

    def _request(self, group: IPv6Address) -> bytes:
        return group.packed + struct.pack("@I", self._index)


def _by_family(addresses: Iterable[IPAddress]) -> tuple[list[IPv4Address], list[IPv6Address]]:
    ips = tuple(addresses)
    return [ip for ip in ips if ip.version == 4], [ip for ip in ips if ip.version == 6]


def _open(link: str) -> socket.socket:
    """A packet socket of a link that hears nothing yet."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    opened = socket.socket(socket.AF_PACKET, kind, 0)
    try:
        opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        opened.bind((link, 0))
    except BaseException:
        opened.close()
        raise
    return opened


def _attach(sock: socket.socket, code: bytes) -> None:
    """Put a filter in the place of the one that is there."""
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
