"""Addresses of LoadBalancer Services in the lab: who answers for them, and who when that node is gone."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scapy.layers.l2 import ARP, Ether

from agent.cli.ask import ask
from agent.cli.status import status
from lab import manifests, netns
from lab.capture import Capture
from lab.limits import SLOWNESS
from lab.manifests import ObjectDirectory
from lab.names import RUN, Address
from lab.objects import Key, Object
from lab.probe import Outcome
from lab.world import Lab
from tests.lab import services

POOL = [{"name": "lab", "addresses": ["172.30.0.200-172.30.0.209", "fd30::200-fd30::209"]}]
FOUR, SIX = ip_address("172.30.0.200"), ip_address("fd30::200")
LIMIT = 10.0 * SLOWNESS
until = functools.partial(services.until, seconds=LIMIT)
TAKE_OVER_S = 5.0
"""So soon another node answers after one has died."""


def service(name: str = "web", **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "annotations": spec.pop("annotations", {})},
        "spec": {
            "type": "LoadBalancer",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": 8080}],
            **spec,
        },
    }


def pod(name: str, node: str, app: str = "web") -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": app}},
        "spec": {
            "nodeName": node,
            "containers": [{"name": "c", "image": "none", "ports": [{"containerPort": 8080}]}],
        },
    }


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three nodes with a Pod each, and a Service with an address of either family."""
    with Lab(nodes=3, flags={"load-balancer-pools": json.dumps(POOL)}) as made:
        made.apply([pod(f"web-{number}", f"node{number}") for number in (1, 2, 3)] + [service()])
        yield made


def state(lab: Lab, node: str) -> dict[str, Any]:
    """What a node's agent says of LoadBalancer addresses; nothing when it does not run."""
    if not lab.agents[node].alive:
        return {"announced": {}}
    said: Any = ask(lab.agents[node].socket, "status", {})
    return {**said["load_balancer"], "object_problems": said["object_problems"]}


def answering(lab: Lab, address: Address = FOUR) -> list[str]:
    """The nodes that say that they answer for an address."""
    return [node for node in lab.agents if str(address) in state(lab, node)["announced"]]


def answerer(lab: Lab, address: Address = FOUR) -> str:
    """The node that answers, once there is one."""
    found: list[str] = until(lambda: answering(lab, address))
    assert len(found) == 1
    return found[0]


def connects(lab: Lab, address: Address = FOUR) -> bool:
    return lab.connect("outside", address, 80) == "connected"


@dataclass
class Prober:
    """Asks who has an address, every 20 ms, and keeps who answered when."""

    capture: Capture
    own: str
    heard: list[tuple[float, str]] = field(default_factory=list)
    seen: int = 0

    def ask(self, address: Address = FOUR) -> None:
        request = ARP(op=1, hwsrc=self.own, psrc="172.30.0.5", pdst=str(address))
        self.capture.send(bytes(Ether(src=self.own, dst="ff:ff:ff:ff:ff:ff") / request))
        time.sleep(0.02)
        frames = self.capture.frames
        for frame in frames[self.seen :]:
            packet = Ether(frame)
            if ARP in packet and packet[ARP].psrc == str(address):
                self.heard.append((time.monotonic(), packet[ARP].hwsrc))
        self.seen = len(frames)

    def ask_until(self, enough: Callable[[], Any], limit_s: float = LIMIT) -> None:
        end = time.monotonic() + limit_s
        while not enough():
            assert time.monotonic() < end, f"not within {limit_s:.0f} s"
            self.ask()

    @property
    def order(self) -> list[str]:
        """The MACs in the order in which they were told, each once in a row."""
        macs = [mac for _, mac in self.heard]
        return [mac for at, mac in enumerate(macs) if not at or macs[at - 1] != mac]


@pytest.fixture
def prober(lab: Lab) -> Iterator[Prober]:
    link = lab.run("outside", ["ip", "-br", "link", "show", "eth0"]).stdout
    with lab.capture("outside", incoming_only=True) as capture:
        yield Prober(capture, link.split()[2])


def test_outside_reaches_the_service_through_one_node(lab: Lab, prober: Prober) -> None:
    answerer(lab, FOUR)
    answerer(lab, SIX)
    until(lambda: connects(lab, FOUR))
    until(lambda: connects(lab, SIX))
    begin = time.monotonic()
    prober.ask_until(lambda: time.monotonic() - begin > 4.0)
    assert len(prober.order) == 1, "over several renewals, no second node answers"


def test_ports_that_no_service_has_are_refused(lab: Lab) -> None:
    """At once, from everywhere; an address of the pool that no Service has is nobody's on the link."""
    for address in (FOUR, SIX):
        answerer(lab, address)
        until(lambda: connects(lab, address))  # noqa: B023 - asked at once
        for source in ("outside", "node1", "node2", "node3", "web-1"):
            assert (source, lab.connect(source, address, 81)) == (source, "refused")
    assert lab.connect("outside", ip_address("172.30.0.209"), 80) in {"silent", "unreachable"}
    assert lab.connect("web-1", ip_address("172.30.0.209"), 80) == "refused"


def die(lab: Lab, node: str) -> float:
    """A node loses its power."""
    lab.agents[node].stop(kill=True)
    lab.unplug(node)
    return time.monotonic()


@pytest.mark.parametrize("address", [FOUR, SIX], ids=["IPv4", "IPv6"])
def test_another_node_takes_over_when_one_dies(
    lab: Lab, address: Address, record_property: Callable[[str, object], None]
) -> None:
    first = answerer(lab, address)
    # Else the dead Pod stays an endpoint until its Node is NotReady, and a third of all tries fail.
    lab.set_ready(first.replace("node", "web-"), False)
    until(lambda: connects(lab, address))
    died = die(lab, first)
    until(lambda: connects(lab, address))
    seconds = time.monotonic() - died
    record_property("take_over_s", round(seconds, 2))
    print(f"{address} answered again {seconds:.2f} s after its node died")
    assert seconds < TAKE_OVER_S * SLOWNESS + 1.0, "a try that fails takes a second"
    assert first not in answering(lab, address)


def test_take_over_on_the_wire(lab: Lab, prober: Prober) -> None:
    """The next node answers within 5 s, and the two never answer at the same time."""
    first = answerer(lab)
    prober.ask_until(lambda: len(prober.heard) > 20)
    died = die(lab, first)
    prober.ask_until(lambda: len(prober.order) > 1)
    seconds = prober.heard[-1][0] - died
    print(f"{FOUR} was at another node {seconds:.2f} s after its own died")
    assert seconds < TAKE_OVER_S * SLOWNESS
    prober.ask_until(lambda: len(prober.heard) > 100)
    assert len(prober.order) == 2


def agent_process(lab: Lab, node: str) -> int:
    """The agent itself, not the worker that it starts."""
    where = netns.identity(lab.netns(node))
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and netns.identity(entry / "ns" / "net") == where:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"agent.main" in words:
                    return int(entry.name)
    raise AssertionError(f"{node} has no agent")


def test_an_agent_that_was_stopped_is_silent_when_it_wakes_up(lab: Lab, prober: Prober) -> None:
    """It finds thousands of questions waiting, from a time when the address was its own, and later ones."""
    process = agent_process(lab, answerer(lab))
    prober.ask_until(lambda: len(prober.heard) > 20)
    os.kill(process, signal.SIGSTOP)
    try:
        prober.ask_until(lambda: len(prober.order) > 1)
        prober.ask_until(lambda: len(prober.heard) > 100)
    finally:
        os.kill(process, signal.SIGCONT)
    prober.ask_until(lambda: len(prober.heard) > 300)
    assert len(prober.order) == 2


def test_a_node_that_ends_hands_over(lab: Lab, prober: Prober) -> None:
    """SIGTERM: others answer at once; only a connection that is under way then breaks; nothing comes back."""
    first = answerer(lab)
    until(lambda: connects(lab))
    begin = time.monotonic()
    lab.agents[first].stop()
    outcomes: list[Outcome] = []
    while not answering(lab):
        assert time.monotonic() - begin < LIMIT, "nobody answers for it"
        outcomes.append(lab.probe("outside", FOUR, 80))
    seconds = time.monotonic() - begin
    print(f"{FOUR} was handed over in {seconds:.2f} s, {len(outcomes)} connections meanwhile")
    assert len([outcome for outcome in outcomes if outcome.verdict != "connected"]) <= 1
    assert seconds < 4.0 * SLOWNESS
    lab.agents[first].start()
    lab.wait_until_ready()
    second = answerer(lab)
    prober.ask_until(lambda: len(prober.heard) > 150)
    assert second != first
    assert len(prober.order) == 2, "from one to the other, and not back"


def test_an_agent_killed_and_started_again_goes_on(lab: Lab) -> None:
    first = answerer(lab)
    lab.agents[first].stop(kill=True)
    lab.agents[first].start()
    lab.wait_until_ready()
    assert answerer(lab)
    until(lambda: connects(lab))


def change_node(lab: Lab, name: str, change: Callable[[Object], None]) -> None:
    """Change a Node as its kubelet or an administrator would."""
    directory = ObjectDirectory(RUN / "cluster", RUN / "scratch")
    node = lab.objects()[Key("Node", "", name)]
    change(node)
    directory.write(node)


CHANGES: dict[str, Callable[[Object], None]] = {
    "cordoned": lambda node: node["spec"].update(unschedulable=True),
    "not ready": lambda node: node["status"].update(conditions=[{"type": "Ready", "status": "Unknown"}]),
    "excluded": lambda node: node["metadata"]["labels"].update(
        {"node.kubernetes.io/exclude-from-external-load-balancers": ""}
    ),
}


@pytest.mark.parametrize("case", CHANGES, ids=list(CHANGES))
def test_a_node_that_shall_not_answer_hands_over(lab: Lab, case: str) -> None:
    first = answerer(lab)
    change_node(lab, first, CHANGES[case])
    until(lambda: answering(lab) and first not in answering(lab))
    assert answerer(lab) != first
    until(lambda: connects(lab))


def test_a_cable_pulled_out_hands_over(lab: Lab) -> None:
    first = answerer(lab)
    lab.unplug(first)
    until(lambda: answering(lab) not in ([], [first]))
    assert "no carrier" in until(lambda: state(lab, first)["silent_because"])
    until(lambda: connects(lab))
    lab.plug(first)
    until(lambda: not state(lab, first)["silent_because"])
    assert answerer(lab) != first, "nothing moves back"


def test_local_is_answered_where_the_pods_are(lab: Lab) -> None:
    """externalTrafficPolicy Local: the node with the Pod, which sees the client's own address."""
    local = service("local", externalTrafficPolicy="Local", selector={"app": "one"})
    address = ip_address("172.30.0.201")
    lab.apply([pod("one", "node2", "one"), local])
    assert answerer(lab, address) == "node2"
    until(lambda: connects(lab, address))
    asked = lab.probe("outside", address, 80, ask="peer")
    assert asked.answer.split()[0] == "172.30.0.5"
    lab.apply([pod("one", "node3", "one")])
    until(lambda: answering(lab, address) == ["node3"])
    until(lambda: connects(lab, address))
    lab.delete([Key("Pod", "default", "one")])
    until(lambda: not answering(lab, address))


def status_of(name: str) -> list[str]:
    """The addresses in a Service's status, as the agents see it."""
    file = RUN / "status" / f"service_default_{name}.json"
    if not file.exists():
        return []
    return [each["ip"] for each in json.loads(file.read_text())["status"]["loadBalancer"]["ingress"]]


def test_statuses_follow_services(lab: Lab) -> None:
    answerer(lab)
    assert status_of("web") == [str(FOUR), str(SIX)]
    asks = {"podwall.dev/load-balancer-ips": "172.30.0.205"}
    lab.apply([service("asks", annotations=asks), service("greedy", annotations=asks)])
    until(lambda: "172.30.0.205" in status_of("asks"))
    assert answerer(lab, ip_address("172.30.0.205"))
    elected = state(lab, "node1")["elected"]
    told = until(lambda: state(lab, elected)["object_problems"])
    used, asked = "pool lab, IPv4: 2 of 10 in use", ["--socket", str(lab.agents[answerer(lab)].socket)]
    said = services.eventually(lambda: CliRunner().invoke(status, asked).output, lambda text: used in text)
    assert used in said
    assert str(FOUR) in next(line for line in said.splitlines() if "answers for" in line)
    assert [(each["object"], each["topic"]) for each in told] == [("default/greedy", "pool")]
    assert "172.30.0.205 was asked for, but Service default/asks has it" in told[0]["problem"]
    lab.apply([service("asks", type="ClusterIP")])
    until(lambda: "172.30.0.205" in status_of("greedy"))
    assert status_of("asks") == []
    until(lambda: connects(lab, ip_address("172.30.0.205")))


def test_another_is_elected(lab: Lab) -> None:
    answerer(lab)
    elected = state(lab, "node1")["elected"]
    die(lab, elected)
    lab.apply([service("later")])
    until(lambda: len(status_of("later")) == 2, seconds=20 * SLOWNESS)


def test_a_deleted_service_is_nobodys(lab: Lab) -> None:
    answerer(lab)
    lab.delete([Key("Service", "default", "web")])
    until(lambda: not answering(lab))
    until(lambda: not [each for each in (RUN / "leases").iterdir() if each.name.startswith("podwall-lb-")])


def test_the_manifest_of_the_example(lab: Lab) -> None:
    example = Path(__file__).parents[2] / "examples" / "services" / "load-balancer.yaml"
    lab.apply(manifests.read([example]))
    for name in ("balanced", "balanced-for-some"):
        until(lambda: len(status_of(name)) == 2)  # noqa: B023 - asked at once
