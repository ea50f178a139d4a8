"""Traffic between Pods that goes on whatever a test does meanwhile, every piece of it numbered.

    UDP   datagram n --> echoed          TCP   number n --> echoed, in order       each every 5 ms
    new   a datagram from a fresh port --> echoed                                  every 50 ms
    denied   a datagram that no policy allows --> must not arrive                  every 5 ms

Sent over IPv4 and IPv6, by a process of its own with priority, so that a silence is the network's. What was
sent and never came back is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from lab import netns
from lab.world import Lab

PORT = 7007
TICK_S = 0.005
FRESH_EVERY = 10  # ticks
PATIENCE_S = 3.0
DENIED = "denied UDP"
NUMBER = struct.Struct("!Q")
RETRANSMITTED = slice(100, 104)  # tcpi_total_retrans of struct tcp_info


@dataclass
class Flow:
    """One numbered exchange; `back` counts what came back as it should, or what arrived but must not."""

    name: str
    sent: int = 0
    back: int = 0
    retransmitted: int = 0
    longest_s: float = 0.0
    out_of_order: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.name}: {self.back} of {self.sent}, longest silence {self.longest_s * 1e3:.0f} ms"
        return f"{text}, {self.retransmitted} retransmitted" if "TCP" in self.name else text


@dataclass(frozen=True)
class End:
    """A Pod that takes part: its namespace and its addresses by IP version."""

    netns: str
    addresses: dict[str, str]


class Traffic:
    """Flows between pairs of Pods, until `stop` is readable."""

    def __init__(
        self, ends: dict[str, End], pairs: Sequence[tuple[str, str]], denied: Sequence[tuple[str, str]]
    ) -> None:
        self._ends = ends
        self._selector = selectors.DefaultSelector()
        self._exchanges: list[_Exchange] = []
        self._open: list[socket.socket] = []
        self._ended = False
        for source, target in pairs:
            for version in (4, 6):
                self._add(source, target, version)
        for source, target in denied:
            for version in (4, 6):
                self._add_denied(source, target, version)

    def run(self, stop: TextIO) -> list[Flow]:
        """Exchange until told to stop, let what is under way come back, and tell of each flow."""
        self._selector.register(stop, selectors.EVENT_READ, self._end)
        self._exchange()
        for each in self._open:
            each.close()
        self._selector.close()
        return [each.flow for each in self._exchanges]

    def _end(self, stop: TextIO) -> None:
        self._ended = True
        self._selector.unregister(stop)

    def _add(self, source: str, target: str, version: int) -> None:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        peer = (self._ends[target].addresses[str(version)], PORT)
        names = f"{source} to {target}, IPv{version}"
        echo = self._socket(target, family, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):  # another flow to this Pod has it already
            echo.bind(peer)
            self._selector.register(echo, selectors.EVENT_READ, _echo_datagrams)
        with self._socket(target, family, socket.SOCK_STREAM) as listening:
            listening.bind((peer[0], 0))
            listening.listen()
            stream = self._socket(source, family, socket.SOCK_STREAM)
            listening.settimeout(5)
            stream.settimeout(5)
            stream.connect(listening.getsockname())
            accepted, _ = listening.accept()
            self._open.append(accepted)
        for each in (stream, accepted):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
        self._selector.register(accepted, selectors.EVENT_READ, _echo_stream)
        steady = self._socket(source, family, socket.SOCK_DGRAM)
        steady.connect(peer)
        self._begin(_Stream(Flow(f"TCP {names}"), stream), stream)
        self._begin(_Datagrams(Flow(f"UDP {names}"), steady), steady)
        self._exchanges.append(_Fresh(Flow(f"new UDP {names}"), self, source, family, peer))

    def _add_denied(self, source: str, target: str, version: int) -> None:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        sink, sender = (self._socket(pod, family, socket.SOCK_DGRAM) for pod in (target, source))
        sink.bind((self._ends[target].addresses[str(version)], 0))
        sender.connect(sink.getsockname())
        self._begin(_Denied(Flow(f"{DENIED} {source} to {target}, IPv{version}"), sender), sink)

    def _begin(self, exchange: _Exchange, of: socket.socket) -> None:
        self._exchanges.append(exchange)
        self._selector.register(of, selectors.EVENT_READ, exchange.receive)

    def _socket(self, pod: str, family: int, kind: int) -> socket.socket:
        made = netns.run(Path(self._ends[pod].netns), socket.socket, family, kind)
        self._open.append(made)
        made.setblocking(False)
        return made

    def fresh(self, exchange: _Fresh, pod: str, family: int) -> socket.socket:
        """A socket with a port that no flow had; `done` with it afterwards."""
        made = self._socket(pod, family, socket.SOCK_DGRAM)
        self._selector.register(made, selectors.EVENT_READ, exchange.receive)
        return made

    def done(self, fresh: socket.socket) -> None:
        self._selector.unregister(fresh)
        self._open.remove(fresh)
        fresh.close()

    def _exchange(self) -> None:
        ticks, next_tick = 0, time.monotonic()
        while not self._ended:
            for each in self._exchanges:
                if ticks % each.every == 0:
                    each.send()
            ticks, next_tick = ticks + 1, next_tick + TICK_S
            self._serve(next_tick)
        patient = time.monotonic() + PATIENCE_S
        waiting = [each for each in self._exchanges if not isinstance(each, _Denied)]
        while time.monotonic() < patient and any(each.missing for each in waiting):
            self._serve(time.monotonic() + TICK_S)
        for each in self._exchanges:
            each.end()

    def _serve(self, until: float) -> None:
        while True:
            left = until - time.monotonic()
            for key, _ in self._selector.select(max(left, 0)):
                key.data(key.fileobj)
            if left <= 0:
                return


class _Exchange:
    """What is sent on a tick, and what is done with what comes back."""

    every = 1

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._last: float | None = None

    @property
    def missing(self) -> int:
        return self.flow.sent - self.flow.back

    def send(self) -> None:
        raise NotImplementedError

    def receive(self, on: socket.socket) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Take down what can only be known at the end."""

    def came(self) -> None:
        now = time.monotonic()
        if self._last is not None:
            self.flow.longest_s = max(self.flow.longest_s, now - self._last)
        self._last = now
        self.flow.back += 1


class _Datagrams(_Exchange):
    def __init__(self, flow: Flow, on: socket.socket) -> None:
        super().__init__(flow)
        self._socket = on

    def send(self) -> None:
        _send(self._socket, NUMBER.pack(self.flow.sent))
        self.flow.sent += 1

    def receive(self, on: socket.socket) -> None:
        for data in _datagrams(on):
            (number,) = NUMBER.unpack(data)
            if number != self.flow.back:
                self.flow.out_of_order.append(number)
            self.came()


class _Denied(_Datagrams):
    """What is received is at the other end: it must be nothing."""


class _Stream(_Exchange):
    def __init__(self, flow: Flow, on: socket.socket) -> None:
        super().__init__(flow)
        self._socket, self._rest = on, b""

    def send(self) -> None:
        assert self._socket.send(NUMBER.pack(self.flow.sent)) == NUMBER.size
        self.flow.sent += 1

    def receive(self, on: socket.socket) -> None:
        self._rest += on.recv(65536)
        while len(self._rest) >= NUMBER.size:
            (number,) = NUMBER.unpack_from(self._rest)
            self._rest = self._rest[NUMBER.size :]
            assert number == self.flow.back
            self.came()

    def end(self) -> None:
        facts = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        self.flow.retransmitted = int.from_bytes(facts[RETRANSMITTED], "little")


class _Fresh(_Exchange):
    every = FRESH_EVERY

    def __init__(self, flow: Flow, of: Traffic, pod: str, family: int, peer: tuple[str, int]) -> None:
        super().__init__(flow)
        self._of, self._pod, self._family, self._peer = of, pod, family, peer

    def send(self) -> None:
        made = self._of.fresh(self, self._pod, self._family)
        made.connect(self._peer)
        _send(made, NUMBER.pack(self.flow.sent))
        self.flow.sent += 1

    def receive(self, on: socket.socket) -> None:
        for _ in _datagrams(on):
            self.came()
            self._of.done(on)
            return


def _send(on: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # an ICMP error of an earlier one: what is lost shows in the count
        on.send(data)


def _datagrams(on: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while True:
            yield on.recv(2048)


def _echo_datagrams(on: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            data, peer = on.recvfrom(2048)
            on.sendto(data, peer)


def _echo_stream(on: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        on.sendall(on.recv(65536))


Pairs = Sequence[tuple[str, str]]


@contextlib.contextmanager
def steady(lab: Lab, pairs: Pairs, denied: Pairs = ()) -> Iterator[None]:
    """Fail unless all that is sent between pairs while the block runs comes back, and nothing denied arrives.

    Prints what there was.
    """
    flows: list[Flow] = []
    with observed(lab, pairs, denied, flows):
        yield
    bad = [str(each) for each in flows if each.back != (0 if each.name.startswith(DENIED) else each.sent)]
    bad += [str(each) for each in flows if each.out_of_order or each.retransmitted]
    assert not bad, f"lost, late or let through: {bad}"
    assert all(flow.sent for flow in flows)


@contextlib.contextmanager
def observed(lab: Lab, pairs: Pairs, denied: Pairs, flows: list[Flow]) -> Iterator[None]:
    """Send while the block runs, print what there was, and add it to `flows`."""
    pods = {name: lab.pod(name) for pair in (*pairs, *denied) for name in pair}
    ends = {
        name: {"netns": str(pod.netns), "addresses": {str(a.version): str(a) for a in pod.addresses}}
        for name, pod in pods.items()
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.agent.traffic", json.dumps([ends, pairs, denied])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdin
        assert child.stdout
        try:
            assert child.stdout.readline() == "begun\n"
            yield
        finally:
            child.stdin.close()
            said = child.stdout.read()
    flows += [Flow(**each) for each in json.loads(said)]
    for kind in ("TCP", "UDP", "new UDP", DENIED):
        if those := [flow for flow in flows if flow.name.startswith(f"{kind} ")]:
            print(_summary(kind, those))


def _summary(kind: str, flows: Sequence[Flow]) -> str:
    sent, back = sum(flow.sent for flow in flows), sum(flow.back for flow in flows)
    if kind == DENIED:
        return f"{kind}: {len(flows)} flows, {back} of {sent} arrived"
    silence = max(flow.longest_s for flow in flows) * 1e3
    again = sum(flow.retransmitted for flow in flows)
    return f"{kind}: {len(flows)} flows, {back} of {sent} came back, longest silence {silence:.0f} ms" + (
        f", {again} retransmitted" if kind == "TCP" else ""
    )


def main() -> None:
    ends, pairs, denied = json.loads(sys.argv[1])
    traffic = Traffic({name: End(**end) for name, end in ends.items()}, pairs, denied)
    os.nice(-10)
    print("begun", flush=True)
    print(json.dumps([asdict(flow) for flow in traffic.run(sys.stdin)]))


if __name__ == "__main__":
    main()
