"""`why` on set-ups that are broken in one way each: the first line names what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest

from agent.cluster.store import snapshot_of
from agent.explain.question import CannotAnswerError, Question
from agent.explain.way import Answer, why
from agent.explain.world import UnknownNameError, World
from lab.services import allocate, slices
from tests.agent.compile.worlds import decoded, namespace, pod, policy

Objects = Iterable[dict[str, Any]]


def node(name: str, address: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


def service(path: str, *, port: int = 80, target: int | str = 8080, **spec: Any) -> dict[str, Any]:
    space, name = path.split("/")
    ports = [{"port": port, "targetPort": target, "name": "http"}]
    spec = {"selector": {"app": name}, "ports": ports, **spec}
    meta = {"namespace": space, "name": name, "uid": f"uid-of-{name}"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}


CLIENT = pod("shop/client", "10.244.0.2", app="client")
WEB = pod("shop/web", "10.244.0.3", ports=[("http", 8080)], app="web")
AWAY = pod("shop/web", "10.244.1.3", node="node-2", ports=[("http", 8080)], app="web")
BASE = (namespace("shop"), namespace("other"), node("node-1", "192.168.10.1"), node("node-2", "192.168.10.2"))


def ready(of: dict[str, Any], *, is_ready: bool = True) -> dict[str, Any]:
    condition = {"type": "Ready", "status": str(is_ready)}
    return {**of, "status": {**of["status"], "conditions": [condition]}}


def world(objects: Objects) -> World:
    """What the API server and its controllers make of these objects."""
    said = [*BASE, *objects]
    pods = [of if of["status"].get("conditions") else ready(of) for of in said if of["kind"] == "Pod"]
    services = allocate([of for of in said if of["kind"] == "Service"], {})
    rest = [of for of in said if of["kind"] not in {"Pod", "Service"}]
    made = slices(services, pods, []).values()
    return World(snapshot_of(decoded(of) for of in (*pods, *services, *rest, *made)))


def ask(objects: Objects, source: str, target: str, port: int | str | None = 80, **more: Any) -> Answer:
    there = world(objects)
    address = ip_address(target) if target[0].isdecimal() else None
    ends = {"source": there.named(source, "shop"), "target": there.named(target, "shop")}
    return why(there, Question(**ends, port=port, address=address, **more))


@dataclass(frozen=True)
class Case:
    name: str
    objects: list[dict[str, Any]]
    cause: str
    sentence: str
    target: str = "web"
    source: str = "client"
    port: int | str | None = 80
    allowed: bool = False
    changes: list[str] = field(default_factory=list)


LOCAL = {"externalTrafficPolicy": "Local", "type": "NodePort"}
ALIAS = {"type": "ExternalName", "externalName": "database.example.com", "selector": None}
DNS = {"protocol": "UDP", "port": 53}

CASES = [
    Case(
        "no policy, a Service with an endpoint",
        [CLIENT, WEB, service("shop/web")],
        "allowed",
        "allowed: Pod shop/client may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction)",
        target="svc/web",
        allowed=True,
    ),
    Case(
        "the selector matches nothing",
        [CLIENT, pod("shop/wep", "10.244.0.3", app="wep", tier="front"), service("shop/web")],
        "selector-mismatch",
        "denied: no Pod of namespace shop has the labels app=web that Service shop/web selects; "
        "the nearest is Pod shop/client with app=client",
        target="svc/web",
    ),
    Case(
        "the Pods are in another namespace",
        [pod("shop/client", "10.244.0.2"), pod("other/web", "10.244.0.3", app="web"), service("shop/web")],
        "selector-mismatch",
        "denied: no Pod of namespace shop has the labels app=web that Service shop/web selects; "
        "Pod other/web has them, but is in another namespace",
        target="svc/web",
    ),
    Case(
        "no Pod is ready",
        [CLIENT, ready(WEB, is_ready=False), service("shop/web")],
        "not-ready",
        "denied: Service shop/web selects 1 Pod, but none is ready: web is not Ready",
        target="svc/web",
    ),
    Case(
        "the name of the targetPort is declared by nobody",
        [CLIENT, WEB, service("shop/web", target="https")],
        "target-port",
        "denied: Service shop/web sends port 80 to targetPort 'https', a name that no container of its Pods "
        "declares (they declare http 8080)",
        target="svc/web",
    ),
    Case(
        "the number of the targetPort is declared by nobody",
        [CLIENT, WEB, service("shop/web", target=8081)],
        "target-port",
        "doubtful: Service shop/web sends port 80 to targetPort 8081, which no container of its Pods "
        "declares (they declare http 8080): unless something listens there unsaid, the Pod refuses",
        target="svc/web",
    ),
    Case(
        "a port that the Service does not have",
        [CLIENT, WEB, service("shop/web")],
        "no-such-port",
        "denied: Service shop/web has no TCP port 443; it has TCP 80 (http), and refuses others",
        target="svc/web",
        port=443,
    ),
    Case(
        "no selector and nobody wrote slices",
        [CLIENT, service("shop/web", selector=None)],
        "no-endpoints",
        "denied: Service shop/web has no selector, and no EndpointSlice has an address at its port 80",
        target="svc/web",
    ),
    Case(
        "ingress denied",
        [CLIENT, WEB, service("shop/web"), policy("shop/deny", podSelector={"matchLabels": {"app": "web"}})],
        "ingress-denied",
        "denied: ingress policy shop/deny of Pod shop/web does not let Pod shop/client in on TCP 8080",
        target="svc/web",
        changes=["spec.ingress"],
    ),
    Case(
        "egress denied",
        [CLIENT, WEB, policy("shop/shut", policyTypes=["Egress"], egress=[{"ports": [DNS]}])],
        "egress-denied",
        "denied: egress policy shop/shut of Pod shop/client does not let it out to Pod shop/web on TCP 8080",
        target="pod/web",
        port="http",
        changes=["spec.egress[0].ports"],
    ),
    Case(
        "a policy in the wrong namespace does nothing",
        [CLIENT, WEB, policy("other/deny")],
        "allowed",
        "allowed: Pod shop/client may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction)",
        target="pod/web",
        port=None,
        allowed=True,
    ),
    Case(
        "a node port closed by externalTrafficPolicy Local",
        [WEB, service("shop/web", **LOCAL, ports=[{"port": 80, "targetPort": 8080, "nodePort": 30080}])],
        "traffic-policy-local",
        "denied: Service shop/web has externalTrafficPolicy: Local and no ready endpoint on node-2; "
        "1 on other nodes do not count",
        source="203.0.113.10",
        target="192.168.10.2",
        port=30080,
    ),
    Case(
        "the same node port on the node that has the Pod",
        [WEB, service("shop/web", **LOCAL, ports=[{"port": 80, "targetPort": 8080, "nodePort": 30080}])],
        "allowed",
        "allowed: 203.0.113.10 (outside the cluster) may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction)",
        source="203.0.113.10",
        target="192.168.10.1",
        port=30080,
        allowed=True,
    ),
    Case(
        "an alias of a name outside",
        [CLIENT, service("shop/web", **ALIAS)],
        "external-name",
        "denied: Service shop/web is an alias: its name answers database.example.com (CNAME); ask about that",
        target="svc/web",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_first_line_names_the_cause(case: Case) -> None:
    answer = ask(case.objects, case.source, case.target, case.port)

    assert (answer.allowed, answer.cause, answer.sentence) == (case.allowed, case.cause, case.sentence)
    assert [change.field for change in answer.changes] == case.changes


def test_the_steps_tell_the_way() -> None:
    admits = policy(
        "shop/web",
        podSelector={"matchLabels": {"app": "web"}},
        ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": 8080}]}],
    )
    answer = ask([CLIENT, WEB, service("shop/web"), admits], "client", "web.shop.svc.cluster.local")
    assert [(step.stage, step.ok, step.text) for step in answer.steps] == [
        ("name", None, "Pod shop/client (10.244.0.2) on node-1 to Service shop/web"),
        (
            "service",
            True,
            "Service shop/web, ClusterIP port 80, goes to one of 1: Pod shop/web (10.244.0.3:8080)",
        ),
        ("egress", True, "allowed: no policy isolates Pod shop/client for egress"),
        (
            "ingress",
            True,
            "allowed: shop/web spec.ingress[0] admits it "
            "(from Pods app=client of its own namespace on TCP 8080)",
        ),
    ]
    assert answer.sentence.endswith("on TCP 8080 (by shop/web spec.ingress[0])")


def test_a_client_from_outside_seems_to_be_the_node_where_it_came_in() -> None:
    """Unless the endpoint is there: a policy that admits its address does not help it elsewhere."""
    block = {"ipBlock": {"cidr": "203.0.113.0/24"}}
    objects = [
        AWAY,
        service("shop/web", type="NodePort", ports=[{"port": 80, "targetPort": 8080, "nodePort": 30080}]),
    ]
    objects.append(policy("shop/web", ingress=[{"from": [block]}]))

    through_other = ask(objects, "203.0.113.10", "192.168.10.1", 30080)
    directly = ask(objects, "203.0.113.10", "192.168.10.2", 30080)

    assert directly.allowed
    assert not through_other.allowed
    assert [step.text for step in through_other.steps if step.stage == "masquerade"] == [
        "its source becomes 192.168.10.1: the endpoint is not on node-1, where it comes in"
    ]


@pytest.mark.parametrize(
    ("target", "port", "said"),
    [
        ("nobody", 80, "is no Pod, Service or node in namespace shop"),
        ("gone/web", 80, "there is no namespace gone"),
        ("other/web", 80, "is not in namespace other, but there is Pod shop/web"),
        ("pod/web", "https", "has no TCP port named 'https'"),
        ("node-1", None, "which port of Node node-1?"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_answered(target: str, port: int | str | None, said: str) -> None:
    with pytest.raises((UnknownNameError, CannotAnswerError), match=said.replace("?", r"\?")):
        ask([CLIENT, WEB], "client", target, port)


def test_a_name_that_two_things_have() -> None:
    with pytest.raises(UnknownNameError, match="may be Pod shop/web, Service shop/web: put pod/, svc/"):
        ask([CLIENT, WEB, service("shop/web")], "client", "web")
