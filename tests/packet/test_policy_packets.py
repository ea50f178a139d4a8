"""A denied packet never arrives, whatever it looks like, and whatever the agent is doing meanwhile.

    attacker (node1) --> victims (node1, node2): only UDP 4444 may come in
    prisoner (node1) --> the open Pods (node1, node2): only UDP 4444 may go out
    attacker         --> the open Pods: the control, no policy is in the way

Frames leave a Pod's eth0 as they are. After them goes a datagram that is allowed; when it has come, all
before it have, or never will. Then what the target heard from the sender must be those datagrams and nothing
else.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from lab.capture import Capture
from lab.objects import Object
from lab.probe import REFUSED
from lab.processes import until
from lab.world import Lab, LabPod
from tests.lab.following import every_node_follows
from tests.lab.policies import expected_matrix, namespace, pod, policy
from tests.lab.services import port, service
from tests.packet.policy_frames import (
    CASES,
    CLOSED_PORT,
    EVIL,
    GOOD,
    OPEN_PORT,
    Way,
    all_denied,
    errors,
    good,
    number,
)

FAMILIES = [4, 6]
SENDERS = ("attacker", "prisoner")
VICTIMS = ("victim-near", "victim-far")
OPEN = ("open-near", "open-far")
DENIED = (*(("attacker", name) for name in VICTIMS), *(("prisoner", name) for name in OPEN))
CONTROLS = tuple(("attacker", name) for name in OPEN)
CHANGES = 100

PORTS = (port(CLOSED_PORT, CLOSED_PORT), *(port(each, each, protocol="UDP") for each in (CLOSED_PORT, 53)))
OPEN_UDP = [{"protocol": "UDP", "port": OPEN_PORT}]
OBJECTS = [
    namespace("evil"),
    pod("evil/attacker", 6000, node="node1", labels={"app": "attacker"}),
    pod("evil/prisoner", node="node1", labels={"app": "prisoner"}),
    *(
        pod(f"evil/{kind}-{where}", 9999, node=node, labels={"app": kind, "where": where})
        for kind in ("victim", "open")
        for where, node in (("near", "node1"), ("far", "node2"))
    ),
    *(
        service(f"evil/{kind}-{where}", {"app": kind, "where": where}, *PORTS)
        for kind in ("victim", "open")
        for where in ("near", "far")
    ),
    policy(
        "evil/victim",
        podSelector={"matchLabels": {"app": "victim"}},
        ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "attacker"}}}], "ports": OPEN_UDP}],
    ),
    policy(
        "evil/prisoner",
        podSelector={"matchLabels": {"app": "prisoner"}},
        policyTypes=["Egress"],
        egress=[{"ports": OPEN_UDP}],
    ),
]


def source_of(frame: bytes) -> bytes:
    """The source address of a frame; nothing when it is no IP."""
    kind = frame[12:14]
    return frame[26:30] if kind == b"\x08\x00" else frame[22:38] if kind == b"\x86\xdd" else b""


def piece_of(frame: bytes) -> tuple[int, int] | None:
    """The number of the datagram that this is a fragment of, and the fragment's place; None when whole."""
    packet = Ether(frame)
    if IPv6ExtHdrFragment in packet:
        return packet[IPv6ExtHdrFragment].id, packet[IPv6ExtHdrFragment].offset
    if IP in packet and (packet[IP].frag or packet[IP].flags.MF):
        return packet[IP].id, packet[IP].frag
    return None


def to_open_port(frame: bytes) -> bool:
    """Whether this is a datagram to the open port, or the first fragment of one."""
    if (piece_of(frame) or (0, 0))[1]:
        return False
    packet = Ether(frame)
    if UDP in packet:
        return bool(packet[UDP].dport == OPEN_PORT) and ICMP not in packet
    fragment = packet.getlayer(IPv6ExtHdrFragment)
    return fragment is not None and bytes(fragment.payload)[2:4] == OPEN_PORT.to_bytes(2, "big")


@dataclass
class Place:
    """A Pod: what its link carries in, and a way to send."""

    pod: LabPod
    mac: str
    gateway: str
    capture: Capture
    seen: int = 0

    def heard(self, sender: Place) -> list[bytes]:
        """The frames that came from a Pod since the last `forget`."""
        own = {address.packed for address in sender.pod.addresses}
        return [frame for frame in self.capture.frames[self.seen :] if source_of(frame) in own]

    def bad(self, sender: Place) -> list[str]:
        """What came from a Pod and is not what is allowed."""
        heard = self.heard(sender)
        firsts = [
            (piece[0], to_open_port(frame)) for frame in heard if (piece := piece_of(frame)) and not piece[1]
        ]
        allowed = {key for key, right in firsts if right} - {key for key, right in firsts if not right}
        return [
            Ether(frame).summary()
            for frame in heard
            if not (to_open_port(frame) or ((piece := piece_of(frame)) and piece[1] and piece[0] in allowed))
        ]

    def forget(self) -> None:
        self.seen = len(self.capture.frames)


@dataclass
class Scene:
    lab: Lab
    places: dict[str, Place] = field(default_factory=dict)
    services: dict[tuple[str, int], str] = field(default_factory=dict)

    def way(self, sender: str, target: str, version: int) -> Way:
        source, to = self.places[sender], self.places[target]
        addresses = (str(each.pod.address(version)) for each in (source, to))
        return Way(source.mac, source.gateway, *addresses, self.services[target, version])

    def send(self, sender: str, frames: list[Packet]) -> None:
        for frame in frames:
            self.places[sender].capture.send(bytes(frame))

    def pass_through(self, sender: str, target: str, version: int) -> None:
        """Return when everything sent before has arrived, or never will."""
        packet, mark = good(self.way(sender, target, version))
        self.send(sender, [packet])
        arrived = self.places[target].capture.wait(lambda frame: mark in frame)
        assert arrived, f"what is allowed from {sender} to {target} does not arrive"

    def forget(self) -> None:
        for place in self.places.values():
            place.forget()

    def bad(self) -> list[str]:
        return [
            f"{sender} to {target}: {what}"
            for sender, target in DENIED
            for what in self.places[target].bad(self.places[sender])
        ]


@contextmanager
def built(lab: Lab) -> Iterator[Scene]:
    scene = Scene(lab)
    with ExitStack() as stack:
        for name in (*SENDERS, *VICTIMS, *OPEN):
            found = lab.pod(f"evil/{name}")
            link = json.loads(lab.run(f"evil/{name}", ["ip", "-j", "link", "show", "eth0"]).stdout)[0]
            gateway = json.loads(lab.run(f"evil/{name}", ["ip", "-j", "neigh", "show"]).stdout)[0]
            capture = stack.enter_context(lab.capture(f"evil/{name}", incoming_only=True))
            scene.places[name] = Place(found, link["address"], gateway["lladdr"], capture)
        for name in SENDERS:
            scene.services |= {(name, version): "" for version in FAMILIES}
        for name in (*VICTIMS, *OPEN):
            there = lab.service(f"evil/{name}")
            scene.services |= {(name, version): str(there.address(version)) for version in FAMILIES}
        yield scene


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab(nodes=2, given=OBJECTS) as lab:
        every_node_follows(lab)
        seen = expected_matrix(lab)
        assert seen.good, seen.render()
        for name in OPEN:  # who listens on another port refuses; a Service that is not in force is silent
            for address in lab.service(f"evil/{name}").cluster_addresses:
                until(
                    lambda: lab.connect("evil/attacker", address, CLOSED_PORT) == REFUSED,  # noqa: B023
                    20,
                    lambda: "the Services are not in force",
                )
        with built(lab) as made:
            yield made


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_a_denied_packet_does_not_arrive(scene: Scene, case: str, version: int) -> None:
    scene.forget()
    for sender, target in DENIED:
        scene.send(sender, CASES[case].denied(scene.way(sender, target, version)))
    for sender, target in CONTROLS:
        scene.send(sender, CASES[case].control(scene.way(sender, target, version)))
    for sender, target in (*DENIED, *CONTROLS):
        scene.pass_through(sender, target, version)

    assert scene.bad() == []
    for sender, target in CONTROLS:
        came = scene.places[target].bad(scene.places[sender])
        wanted = 1 if "ragment" in case else len(CASES[case].control(scene.way(sender, target, version)))
        assert len(came) >= wanted, f"the control does not reach {target}: {came}"


def reply(way: Way, upper: Packet) -> Packet:
    return way.ip() / upper


def echo(kind: str, version: int, key: int) -> Packet:
    if version == 4:
        return ICMP(type=8 if kind == "request" else 0, id=key, seq=1) / Raw(EVIL)
    make = ICMPv6EchoRequest if kind == "request" else ICMPv6EchoReply
    return make(id=key, seq=1, data=EVIL)


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_what_a_victim_began_opens_nothing_else(scene: Scene, victim: str, version: int) -> None:
    """Echo requests, other ports and other protocols of the one whom the victim has just spoken to."""
    there, back = scene.way(victim, "attacker", version), scene.way("attacker", victim, version)
    key, mine, theirs = number(), number(), number()
    began = [echo("request", version, key), UDP(sport=mine, dport=theirs) / Raw(GOOD)]
    began.append(TCP(sport=mine, dport=theirs, flags="S", seq=1))
    scene.send(victim, [there.ip() / upper for upper in began])
    attacker = scene.places["attacker"].capture
    own = ip_address(there.source).packed
    assert attacker.wait(lambda frame: source_of(frame) == own and GOOD in frame)
    # The attacker's kernel answers the echo (this is one control) and resets the connection.
    scene.pass_through("attacker", victim, version)
    answers = scene.places[victim].heard(scene.places["attacker"])
    assert any(EVIL in frame for frame in answers), "the answer to the victim's own echo does not come"
    scene.forget()

    denied = [
        echo("request", version, key),
        echo("request", version, key + 1),
        echo("reply", version, key + 1),
        UDP(sport=theirs, dport=mine + 1) / Raw(EVIL),
        UDP(sport=theirs + 1, dport=mine) / Raw(EVIL),
        TCP(sport=theirs, dport=mine + 1, flags="SA", ack=2) / Raw(EVIL),
        TCP(sport=theirs + 1, dport=mine, flags="SA", ack=2) / Raw(EVIL),
        TCP(sport=theirs + 1, dport=mine, flags="S") / Raw(EVIL),
        UDP(sport=mine, dport=theirs) / Raw(EVIL),
    ]
    scene.send("attacker", [reply(back, upper) for upper in denied])
    scene.pass_through("attacker", victim, version)
    assert scene.bad() == []

    scene.send("attacker", [reply(back, UDP(sport=theirs, dport=mine) / Raw(EVIL))])  # the answer itself
    assert scene.places[victim].capture.wait(lambda frame: EVIL in frame)
    scene.forget()


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_an_error_about_somebody_elses_flow_does_not_arrive(scene: Scene, victim: str, version: int) -> None:
    """The victim speaks to an open Pod and to the attacker, who may send errors about the latter only."""
    back = scene.way("attacker", victim, version)
    scene.forget()
    told = {}
    for peer in ("open-near", "attacker"):
        packet = scene.way(victim, peer, version).ip() / UDP(sport=number(), dport=number()) / Raw(GOOD)
        scene.send(victim, [packet])
        own = ip_address(back.target).packed
        assert scene.places[peer].capture.wait(
            lambda frame: GOOD in frame and source_of(frame) == own  # noqa: B023 - called at once
        )
        told[peer] = packet[IP if version == 4 else IPv6]
    scene.pass_through("attacker", victim, version)
    scene.forget()

    scene.send("attacker", errors(back, told["open-near"]))
    scene.pass_through("attacker", victim, version)
    own = ip_address(back.source).packed
    evil = [
        frame for frame in scene.places[victim].heard(scene.places["attacker"]) if not to_open_port(frame)
    ]
    assert [Ether(frame).summary() for frame in evil] == []

    scene.send("attacker", errors(back, told["attacker"]))
    assert scene.places[victim].capture.wait(
        lambda frame: source_of(frame) == own and not to_open_port(frame)
    )
    scene.forget()


class Barrage:
    """Sends everything that is denied, over and over, with a datagram that is allowed after each volley."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.volleys = 0
        self.allowed: list[tuple[str, str, bytes]] = []
        self._stop = threading.Event()
        self._frames = {
            (sender, target): [
                frame for version in FAMILIES for frame in all_denied(scene.way(sender, target, version))
            ]
            for sender, target in DENIED
        }
        self._thread = threading.Thread(target=self._run, name="podwall-barrage")

    def __enter__(self) -> Barrage:
        self.scene.forget()
        self._thread.start()
        self.wait(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self, more: int) -> None:
        """Return after so many more volleys."""
        wanted = self.volleys + more
        until(lambda: self.volleys >= wanted, 20, lambda: f"{self.volleys} volleys were sent, not {wanted}")

    def lost(self) -> list[str]:
        """The allowed datagrams that did not arrive."""
        heard = {target: self.scene.places[target].capture for _, target in DENIED}
        frames = {target: b"".join(capture.frames) for target, capture in heard.items()}
        return [
            f"{sender} to {target}: {mark!r}"
            for sender, target, mark in self.allowed
            if mark not in frames[target]
        ]

    def _run(self) -> None:
        while not self._stop.is_set():
            for (sender, target), frames in self._frames.items():
                for frame in frames:
                    self.scene.places[sender].capture.send(frame)
                for version in FAMILIES:
                    packet, mark = good(self.scene.way(sender, target, version))
                    self.scene.send(sender, [packet])
                    self.allowed.append((sender, target, mark))
            self.volleys += 1
            self._stop.wait(0.02)  # two cores are shared with the agents


def over(scene: Scene, barrage: Barrage) -> None:
    """Nothing that is denied arrived, and everything that is allowed did."""
    for sender, target in DENIED:
        for version in FAMILIES:
            scene.pass_through(sender, target, version)
    assert scene.bad() == []
    assert barrage.lost() == []
    scene.forget()


def test_the_barrage_is_heard_where_nothing_is_denied(scene: Scene) -> None:
    """The control of the tests below: without the policies its frames arrive."""
    policies = [each for each in OBJECTS if each["kind"] == "NetworkPolicy"]
    scene.lab.apply([each for each in OBJECTS if each not in policies], prune=True)
    try:
        assert expected_matrix(scene.lab).good
        with Barrage(scene) as barrage:
            barrage.wait(2)
            until(
                lambda: all(
                    any(EVIL in frame for frame in scene.places[target].heard(scene.places[sender]))
                    for sender, target in DENIED
                ),
                5,
                lambda: "the barrage does not arrive though nothing denies it",
            )
    finally:
        scene.lab.apply(OBJECTS, prune=True)
        assert expected_matrix(scene.lab).good
        scene.forget()


def test_nothing_denied_arrives_while_agents_are_killed_and_come_back(scene: Scene) -> None:
    with Barrage(scene) as barrage:
        for agent in scene.lab.agents.values():
            agent.stop(kill=True)
        barrage.wait(3)
        for agent in scene.lab.agents.values():
            agent.start()
        scene.lab.wait_until_ready()
        barrage.wait(3)
    over(scene, barrage)


def commits(log: Path) -> int:
    return log.read_text().count("event=committed")


def changed(number: int) -> list[Object]:
    """The policies with others beside them that deny and allow the same, each time different ones."""
    nobody = [
        {"ipBlock": {"cidr": f"192.0.2.{number}/32"}},
        {"podSelector": {"matchLabels": {"app": "nobody"}}},
    ]
    victim, prisoner = {"matchLabels": {"app": "victim"}}, {"matchLabels": {"app": "prisoner"}}
    beside = [
        policy("evil/more", podSelector=victim, ingress=[{"from": nobody, "ports": [{"port": 8080}]}]),
        policy("evil/third", podSelector=victim, ingress=[{"ports": OPEN_UDP}], egress=[{}]),
        policy("evil/out", podSelector=prisoner, policyTypes=["Egress"], egress=[{"to": nobody}]),
        policy(
            "evil/both",
            podSelector={
                "matchExpressions": [{"key": "app", "operator": "In", "values": ["victim", "prisoner"]}]
            },
        ),
    ]
    return [each for index, each in enumerate(beside) if index == number % 2 or (number >> index) % 2]


def test_nothing_denied_arrives_while_policies_change(scene: Scene) -> None:
    """Each change is in force on a node before the next comes."""
    lab = scene.lab
    with Barrage(scene) as barrage:
        for step in range(CHANGES):
            before = [commits(agent.log) for agent in lab.agents.values()]
            lab.apply([*OBJECTS, *changed(step)], prune=True)
            until(
                lambda: [commits(agent.log) for agent in lab.agents.values()] != before,  # noqa: B023
                5,
                lambda: f"nobody committed change {step}",  # noqa: B023
            )
    lab.apply(OBJECTS, prune=True)
    over(scene, barrage)


def test_a_socket_in_the_scene_still_works(scene: Scene) -> None:
    """What is allowed is, by ordinary means."""
    with scene.lab.socket("evil/attacker", socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(GOOD, (str(scene.places["victim-far"].pod.address(4)), OPEN_PORT))
        assert scene.places["victim-far"].capture.wait(lambda frame: GOOD in frame)
