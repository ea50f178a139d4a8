"""Denied packets: what the kernel logs of real ones, what is made of odd ones, and what a flood costs.

sender --frames--> veth --> rule: log group 9619 prefix "podwall ingress 1a2b", drop
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from scapy.config import conf
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from agent import denials, headers
from agent.denials import Denial, Denials, Denied, Reason, Repeats, Subscription, denial_of, line
from agent.nflog import Logged, Nflog, NflogError, packet
from agent.nft.model import TcpFlag
from lab.limits import SLOWNESS
from tests.agent.waiting import eventually
from tests.linux import command, own_netns

GROUP = 9619
PREFIX = "podwall ingress 1a2b"
LIMIT_S = 10.0 * SLOWNESS
RULES = f"""
table inet podwall_test {{
    chain prerouting {{
        type filter hook prerouting priority -450;
        iifname "podwall0" log group {GROUP} snaplen 128 prefix "{PREFIX}" drop
    }}
}}
"""
MAC = "02:00:00:00:00:01"
V4, V6 = {"src": "10.8.0.2", "dst": "10.8.0.1"}, {"src": "fd08::2", "dst": "fd08::1"}


@pytest.fixture
def sender() -> Iterator[socket.socket]:
    """A namespace around the test, with a socket whose frames arrive at the rule."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with own_netns():
        command("ip", "link", "add", "podwall0", "address", MAC, "type", "veth", "peer", "name", "podwall1")
        silent = "net.ipv6.conf.podwall1.disable_ipv6=1"  # or the kernel itself would send there
        command("sysctl", "-qw", "net.ipv6.conf.podwall0.disable_ipv6=0", silent)
        command("ip", "-batch", "-", data="link set podwall0 up\nlink set podwall1 up")
        command("nft", "-f", "-", data=RULES)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as made:
            made.bind(("podwall1", 0))
            yield made


def frame(of: Packet) -> bytes:
    return bytes(Ether(dst=MAC, src="02:00:00:00:00:02") / of)


def named(denial: Denial) -> Reason:
    _, direction, pod_class = denial.prefix.split()
    return Reason("shop/api", f"outside/{denial.source}", direction, pod_class)


def nobody(_: Denial) -> Reason:
    return Reason()


async def first_of(events: Subscription) -> Denied:
    async with asyncio.timeout(LIMIT_S):
        while not (taken := events.take()):  # noqa: ASYNC110 - nobody could set an event
            await asyncio.sleep(0.01)
    return taken[0]


def reading(
    body: Callable[[Denials], Coroutine[Any, Any, None]],
    describe: Callable[[Denial], Reason] = named,
    **options: int,
) -> Denials:
    """Call with denials that are being read."""
    made = Denials(GROUP, describe, **options)

    async def run() -> None:
        task = asyncio.create_task(made.run())
        await asyncio.sleep(0)  # the group is bound in the first step
        await asyncio.sleep(0)
        try:
            await body(made)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())
    return made


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# What the kernel logs

TCP_SYN = TCP(sport=41000, dport=8080, flags="S")
KERNEL_CASES: dict[str, tuple[Packet, dict[str, object]]] = {
    "tcp": (IP(**V4) / TCP_SYN, {"protocol": 6, "sport": 41000, "dport": 8080, "tcp_flags": TcpFlag.SYN}),
    "tcp6": (IPv6(**V6) / TCP_SYN, {"protocol": 6, "sport": 41000, "dport": 8080, "tcp_flags": TcpFlag.SYN}),
    "udp": (IP(**V4) / UDP(sport=5, dport=53) / Raw(b"q" * 500), {"protocol": 17, "sport": 5, "dport": 53}),
    "udp6": (IPv6(**V6) / UDP(sport=5, dport=53), {"protocol": 17, "sport": 5, "dport": 53}),
    "sctp": (IP(**V4) / SCTP(sport=7, dport=9), {"protocol": 132, "sport": 7, "dport": 9}),
    "echo": (IP(**V4) / ICMP(type=8), {"protocol": 1, "icmp_type": 8, "dport": 0}),
    "echo6": (IPv6(**V6) / ICMPv6EchoRequest(), {"protocol": 58, "icmp_type": 128, "dport": 0}),
    "options": (
        IP(**V4, options=[IPOption_NOP()] * 8) / UDP(sport=5, dport=53),
        {"protocol": 17, "sport": 5, "dport": 53},
    ),
    "unknown protocol": (IP(**V4, proto=253) / Raw(b"\0" * 40), {"protocol": 253, "sport": 0, "dport": 0}),
    "three bytes of tcp": (IP(**V4, proto=6) / Raw(b"\1\2\3"), {"protocol": 6, "sport": 0, "dport": 0}),
    "five bytes of tcp": (
        IP(**V4, proto=6) / Raw(b"\1\2\3\4\5"),
        {"protocol": 6, "sport": 0x102, "dport": 0x304, "tcp_flags": 0},
    ),
    "nothing behind ip": (IP(**V4, proto=17), {"protocol": 17, "sport": 0, "dport": 0}),
    "first fragment": (
        IP(**V4, flags="MF") / UDP(sport=5, dport=53, len=3000) / Raw(bytes(64)),
        {"protocol": 17, "dport": 53, "fragment": False},
    ),
    "later fragment": (
        IP(**V4, frag=100, proto=17) / Raw(b"\0\5\0\x35" * 4),
        {"protocol": 17, "dport": 0, "fragment": True},
    ),
    "later fragment6": (
        IPv6(**V6) / IPv6ExtHdrFragment(offset=100, nh=17) / Raw(bytes(64)),
        {"protocol": 17, "dport": 0, "fragment": True},
    ),
    "first fragment6": (
        IPv6(**V6) / IPv6ExtHdrFragment(offset=0, m=1) / UDP(sport=5, dport=53) / Raw(bytes(64)),
        {"protocol": 17, "dport": 53, "fragment": False},
    ),
    "extension headers": (
        IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(segleft=0) / TCP_SYN,
        {"protocol": 6, "dport": 8080, "tcp_flags": TcpFlag.SYN},
    ),
    "authenticated": (
        IPv6(**V6) / AH(nh=17, payloadlen=4, icv=bytes(12)) / UDP(sport=5, dport=53),
        {"protocol": 17, "dport": 53},
    ),
    "no next header": (IPv6(**V6, nh=59) / Raw(b"\xff" * 40), {"protocol": 59, "dport": 0}),
    "headers beyond the copy": (
        IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(len=20, nh=17) / Raw(b"\1" * 400),
        {"protocol": 17, "dport": 0},
    ),
    "icmpv6 over ipv4": (IP(**V4, proto=58) / Raw(b"\x80\0\0\0"), {"protocol": 58, "icmp_type": None}),
}


def test_real_packets_are_read(sender: socket.socket) -> None:
    async def body(made: Denials) -> None:
        for name, (sent, expected) in KERNEL_CASES.items():
            with contextlib.closing(made.subscribe()) as events:
                sender.send(frame(sent))
                denied = await first_of(events)
            first = denied.first
            family = 6 if IPv6 in sent else 4
            ends = V6 if family == 6 else V4
            assert (first.source, first.destination) == tuple(map(ip_address, ends.values())), name
            assert (first.family, first.prefix) == (family, PREFIX), name
            assert (first.in_link, first.out_link, denied.count) == ("podwall0", "", 1), name
            assert abs(first.time - time.time()) < LIMIT_S, name
            assert {key: getattr(first, key) for key in expected} == expected, name

    denials_before = denials.TOGETHER_S
    denials.TOGETHER_S = 0.0  # each case is told as soon as it was read
    try:
        made = reading(body)
    finally:
        denials.TOGETHER_S = denials_before
    assert made.packets == len(KERNEL_CASES)
    assert made.lost == 0
    assert [each.first.protocol for each in made.recent()] == [
        expected["protocol"] for _, expected in KERNEL_CASES.values()
    ]


def test_repeats_are_one_event_one_line_and_counted(
    sender: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agent.denials")
    labels = {"direction": "ingress", "namespace": "shop", "pod": "api"}
    before = metric("podwall_denials_total", **labels)

    async def body(made: Denials) -> None:
        for port in range(100):
            sender.send(frame(IP(**V4) / TCP(sport=40000 + port, dport=8080, flags="S")))
        sender.send(frame(IP(**V4) / TCP(sport=1, dport=8081, flags="S")))
        await eventually(lambda: len(made.recent()) == 2)
        made.forget("shop", "web")
        assert metric("podwall_denials_total", **labels) == before + 101
        made.forget("shop", "api")
        assert metric("podwall_denials_total", **labels) == 0

    first, second = reading(body).recent()
    assert (first.count, first.first.sport, first.first.dport) == (100, 40000, 8080)
    assert (second.count, second.first.dport) == (1, 8081)
    assert first.last_time >= first.first.time
    assert caplog.messages == [
        f"event=denied direction=ingress pod=shop/api peer=outside/10.8.0.2 protocol=tcp source=10.8.0.2 "
        f"destination=10.8.0.1 dport={port} in=podwall0 out= class=1a2b count={count}"
        for port, count in ((8080, 100), (8081, 1))
    ]


def test_a_flood_is_bounded(sender: socket.socket) -> None:
    """20,000 packets as fast as they can be sent, from 20,000 ports to 500: most are only counted."""
    frames = [
        frame(IP(**V4, id=1) / UDP(sport=1024 + n, dport=1 + n % 500, chksum=0) / Raw(b"x"))
        for n in range(500)
    ]
    used = 0.0

    def flood() -> None:
        for _ in range(40):
            for each in frames:
                sender.send(each)

    async def body(made: Denials) -> None:
        nonlocal used
        begun = time.thread_time()
        await asyncio.to_thread(flood)
        longest = 0.0
        async with asyncio.timeout(LIMIT_S):
            while made.packets + made.lost < 20_000:
                sender.send(frames[0])  # only a packet that comes tells how many did not
                at = time.perf_counter()
                await asyncio.sleep(0.02)
                longest = max(longest, time.perf_counter() - at)
        used = time.thread_time() - begun
        assert longest < 1.0

    made = reading(body, nobody)
    print(f"{made.packets} looked at, {made.lost} lost, {used * 1e3:.0f} ms CPU")
    assert used < 1.0
    assert metric("podwall_denials_lost_total") >= made.lost


def test_what_the_kernel_had_to_drop_is_counted(sender: socket.socket) -> None:
    nflog = Nflog(GROUP, receive_bytes=1)
    try:
        each = frame(IP(**V4) / TCP_SYN)
        for _ in range(2000):
            sender.send(each)
        seen = settled(nflog)
        assert nflog.overruns >= 1
        assert 0 < seen < 2000
        sender.send(each)
        seen += settled(nflog)
        assert seen + nflog.lost == 2001
    finally:
        nflog.close()


def settled(nflog: Nflog) -> int:
    """Read until nothing has come for longer than the kernel collects."""
    seen = 0
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.4:
        while (logged := nflog.read()) is not None:
            seen += len(logged)
            quiet_since = time.monotonic()
        threading.Event().wait(0.02)
    return seen


def test_a_taken_group_is_told_and_waited_for(
    sender: socket.socket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denials, "RETRY_S", 0.05)
    other = Nflog(GROUP)
    with pytest.raises(NflogError, match="another program reads it"):
        Nflog(GROUP)

    async def body(made: Denials) -> None:
        await eventually(lambda: "event=denials-not-read" in caplog.text)
        other.close()
        await eventually(lambda: caplog.messages.count(caplog.messages[0]) == len(caplog.messages))

        def arrived() -> bool:
            sender.send(frame(IP(**V4) / TCP_SYN))
            return made.packets > 0

        await eventually(arrived)

    reading(body)


# Without the kernel


def denial(dport: int = 80, sport: int = 1, **changes: object) -> Denial:
    fields: dict[str, Any] = {
        "time": 1.0,
        "prefix": PREFIX,
        "in_link": "a",
        "out_link": "b",
        "family": 4,
        "source": ip_address("10.8.0.2"),
        "destination": ip_address("10.8.0.1"),
        "protocol": 6,
        "sport": sport,
        "dport": dport,
    }
    return Denial(**{**fields, **changes})


def test_repeats_end_in_order_and_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denials, "MOST_OPEN", 3)
    repeats = Repeats(named)
    assert repeats.next_end() is None
    for now, port in ((0.0, 1), (0.1, 2), (0.2, 1), (0.3, 3)):
        assert repeats.add(denial(port, time=now), now) is None
    pushed = repeats.add(denial(4), 0.4)
    assert pushed is not None
    assert (pushed.first.dport, pushed.count, pushed.last_time) == (1, 2, 0.2)
    assert repeats.next_end() == pytest.approx(1.1)
    assert [each.first.dport for each in repeats.ended(1.35)] == [2, 3]
    assert [each.first.dport for each in repeats.ended(9.0)] == [4]
    assert list(repeats.ended(9.0)) == []


def test_what_makes_a_repeat() -> None:
    other = denial(time=2.0, sport=2, tcp_flags=16)
    assert denials._key(other) == denials._key(denial())
    for changes in ({"dport": 81}, {"protocol": 17}, {"in_link": "c"}, {"source": ip_address("10.8.0.3")}):
        assert denials._key(denial(**changes)) != denials._key(denial()), changes


def test_a_slow_follower_loses_the_oldest_and_knows() -> None:
    followers: set[Subscription] = set()
    with contextlib.closing(Subscription(followers, 2)) as slow:
        for port in (1, 2, 3):
            slow.put(Denied(denial(port), Reason(), 1, 1.0))
        assert [each.first.dport for each in slow.take()] == [2, 3]
        assert slow.missed == 1
        assert followers == {slow}
    assert not followers


def test_lines_are_limited_and_the_rest_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agent.denials")
    lines = denials._Lines()
    for _ in range(denials.BURST + 30):
        lines.write(Denied(denial(), Reason(), 1, 1.0), 100.0)
    assert len(caplog.messages) == denials.BURST
    lines.write(Denied(denial(), Reason(), 1, 1.0), 101.0)
    assert caplog.messages[denials.BURST] == "event=denied-not-logged events=30"


def test_metrics_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denials, "MOST_PODS", 2)
    made = Denials(GROUP, nobody)
    for name in ("a", "b", "c", "d", "a"):
        made._count(Denied(denial(), Reason(f"few/{name}", "", "egress"), 2, 1.0))
    assert metric("podwall_denials_total", direction="egress", namespace="few", pod="a") == 4
    assert metric("podwall_denials_total", direction="egress", namespace="few", pod="c") == 0
    assert metric("podwall_denials_total", direction="egress", namespace="", pod="others") == 4


def test_lines() -> None:
    echo = denial(0, protocol=1, icmp_type=8, fragment=True)
    text = line(Denied(echo, Reason("a/b", "c/d", "egress", "1f"), 3, 1.0))
    assert text == (
        "event=denied direction=egress pod=a/b peer=c/d protocol=icmp source=10.8.0.2 destination=10.8.0.1 "
        "icmp_type=8 fragment=true in=a out=b class=1f count=3"
    )


SEEDS = [bytes(sent) for sent, _ in KERNEL_CASES.values()]
SEEDS += [bytes(part) for part in fragment(IP(**V4) / UDP(sport=5, dport=53) / Raw(bytes(4000)))]


@given(st.binary(max_size=160))
def test_any_bytes_are_read(data: bytes) -> None:
    headers.read(data)
    headers.read(b"\x45" + data)
    headers.read(b"\x60" + data)


@given(st.sampled_from(SEEDS), st.data())
def test_damaged_packets_are_read(seed: bytes, data: st.DataObject) -> None:
    spoilt = bytearray(seed)
    for place in data.draw(st.lists(st.integers(0, min(len(spoilt), 100) - 1), max_size=6)):
        spoilt[place] = data.draw(st.integers(0, 255))
    cut = bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))])
    found = denial_of(Logged("", 0, 0, 0.0, cut), 5.0, lambda _: "")
    assert found is None or found.time == 5.0


@given(st.dictionaries(st.integers(0, 20), st.binary(max_size=40)))
def test_any_attributes_are_read(values: dict[int, bytes]) -> None:
    packet(values)


def test_endless_extension_headers_end() -> None:
    data = bytes(IPv6(**V6, nh=60)) + b"\x3c\0\0\0\0\0\0\0" * 1000
    found = headers.read(data)
    assert found is not None
    assert (found.protocol, found.dport) == (60, 0)


conf.verb = 0
