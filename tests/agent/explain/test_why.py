"""`why` on set-ups that are broken in one way each: the first line names what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest
from msgspec.structs import replace

from agent.cluster.store import snapshot_of
from agent.compile.service import ServiceSettings
from agent.explain.answer import Answer
from agent.explain.question import CannotAnswerError, Question
from agent.explain.way import why
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
    services = [
        made
        for of in said
        if of["kind"] == "Service"
        for made in allocate([of], {})  # one by one: two may claim one address
    ]
    rest = [of for of in said if of["kind"] not in {"Pod", "Service"}]
    made = slices(services, pods, []).values()
    return World(snapshot_of(decoded(of) for of in (*pods, *services, *rest, *made)))


def ask(objects: Objects, source: str, target: str, port: int | str | None = 80, **more: Any) -> Answer:
    there = world(objects)
    address = ip_address(target) if target[0].isdecimal() else None
    ends = {"source": there.named(source, "shop"), "target": there.named(target, "shop")}
    return why(there, Question(**ends, port=port, address=address, by_name=not address, **more))


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


def of_web(**rule: Any) -> dict[str, Any]:
    """A policy for web with one ingress rule."""
    return policy("shop/web", podSelector=OF_WEB, ingress=[rule])


def labelled(of: dict[str, Any], **labels: str) -> dict[str, Any]:
    return {**of, "metadata": {**of["metadata"], "labels": labels}}


def aged(of: dict[str, Any]) -> dict[str, Any]:
    """Older than all others, which do not say when they were made."""
    return {**of, "metadata": {**of["metadata"], "creationTimestamp": "2020-01-01T00:00:00Z"}}


def balanced(of: dict[str, Any], *addresses: str) -> dict[str, Any]:
    return {**of, "status": {"loadBalancer": {"ingress": [{"ip": each} for each in addresses]}}}


def host_port(of: dict[str, Any], number: int) -> dict[str, Any]:
    (container,) = of["spec"]["containers"]
    ports = [{**each, "hostPort": number} for each in container["ports"]]
    return {**of, "spec": {**of["spec"], "containers": [{**container, "ports": ports}]}}


LOCAL = {"externalTrafficPolicy": "Local", "type": "NodePort"}
ALIAS = {"type": "ExternalName", "externalName": "database.example.com", "selector": None}
ALIAS_INSIDE = ALIAS | {"externalName": "web.shop.svc.cluster.local"}
DNS = {"protocol": "UDP", "port": 53}
OF_WEB = {"matchLabels": {"app": "web"}}
TO_WEB = [{"to": [{"podSelector": OF_WEB}]}]
SHUT = policy("shop/shut", policyTypes=["Egress"], egress=TO_WEB)
FROM_TEAM = [{"from": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]}]
ANOTHER_PROXY = {"service.kubernetes.io/service-proxy-name": "other"}
AT = {"clusterIPs": ["10.96.9.9"]}
FOR_SOME = {"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"]}
FROM_CLIENT = {"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": 8080}]}
DNS_SERVER = (
    pod("kube-system/dns", "10.244.1.53", node="node-2", **{"k8s-app": "kube-dns"}),
    service(
        "kube-system/kube-dns",
        selector={"k8s-app": "kube-dns"},
        ports=[{"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53}],
    ),
)

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
        "denied: egress policy shop/shut of Pod shop/client does not let it out to Pod shop/web on TCP 8080: "
        "it is for UDP 53 only",
        target="pod/web",
        port="http",
        changes=["spec.egress"],
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
        "allowed: Service shop/web is an alias of database.example.com (CNAME), "
        "and no policy isolates Pod shop/client for egress",
        target="svc/web",
        allowed=True,
    ),
    Case(
        "an alias of a name outside, for a Pod that policies isolate",
        [CLIENT, service("shop/web", **ALIAS), policy("shop/shut", policyTypes=["Egress"])],
        "external-name",
        "doubtful: Service shop/web is an alias of database.example.com (CNAME), and shop/shut decide by the "
        "address that it has: ask about that",
        target="svc/web",
    ),
    Case(
        "an alias of a Service in another namespace",
        [CLIENT, WEB, service("shop/web"), service("other/web", **ALIAS_INSIDE)],
        "allowed",
        "allowed: Pod shop/client may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction)",
        target="svc/other/web",
        allowed=True,
    ),
    Case(
        "the namespace has another label than the policy asks for",
        [CLIENT, WEB, policy("shop/web", podSelector=OF_WEB, ingress=FROM_TEAM)],
        "ingress-denied",
        "denied: ingress policy shop/web of Pod shop/web does not let Pod shop/client in on TCP 8080: its "
        "namespaceSelector asks for team=web, but namespace shop has no label team",
        target="pod/web",
        port=None,
        changes=["spec.ingress"],
    ),
    Case(
        "the peer is in another namespace than the policy",
        [WEB, pod("other/client", "10.244.1.9", app="client"), policy("shop/web", ingress=[FROM_CLIENT])],
        "ingress-denied",
        "denied: ingress policy shop/web of Pod shop/web does not let Pod other/client in on TCP 8080: "
        "without a namespaceSelector it means Pods of namespace shop, but Pod other/client is in another",
        source="other/client",
        target="pod/web",
        port=None,
        changes=["spec.ingress[0].from"],
    ),
    Case(
        "the policy that would admit it stands in another namespace",
        [CLIENT, WEB, policy("shop/deny"), policy("other/web", podSelector=OF_WEB, ingress=[FROM_CLIENT])],
        "ingress-denied",
        "denied: ingress policy shop/deny of Pod shop/web does not let Pod shop/client in on TCP 8080; "
        "other/web would, but it stands in namespace other, where it selects no Pod, not in shop",
        target="pod/web",
        port=None,
        changes=["spec.ingress"],
    ),
    Case(
        "a policy names the Service's port instead of the Pod's",
        [CLIENT, WEB, service("shop/web"), of_web(ports=[{"port": 80}])],
        "ingress-denied",
        "denied: ingress policy shop/web of Pod shop/web does not let Pod shop/client in on TCP 8080: it is "
        "for port 80, the Service's, while policies see the Pod's port 8080",
        target="svc/web",
        changes=["spec.ingress"],
    ),
    Case(
        "a policy names a port that no container declares",
        [CLIENT, WEB, of_web(ports=[{"port": "metrics"}])],
        "ingress-denied",
        "denied: ingress policy shop/web of Pod shop/web does not let Pod shop/client in on TCP 8080: its "
        "port 'metrics' is a name that no container of Pod shop/web declares",
        target="pod/web",
        port=None,
        changes=["spec.ingress"],
    ),
    Case(
        "a port by a name that the Service does not have",
        [CLIENT, WEB, service("shop/web")],
        "no-such-port",
        "denied: Service shop/web has no TCP port named 'https'; it has TCP 80 (http)",
        target="svc/web",
        port="https",
    ),
    Case(
        "a port by a name that the Pod does not have",
        [CLIENT, WEB],
        "no-such-port",
        "denied: Pod shop/web has no TCP port named 'https'; its names are: http 8080",
        target="pod/web",
        port="https",
    ),
    Case(
        "the DNS is not to be asked",
        [CLIENT, WEB, service("shop/web"), *DNS_SERVER, SHUT],
        "dns-denied",
        "denied: Pod shop/client may not ask the cluster's DNS for the address of Service shop/web: egress "
        "policy shop/shut of Pod shop/client does not let it out to Pod kube-system/dns on UDP 53",
        target="svc/web",
        changes=["spec.egress"],
    ),
    Case(
        "an external address that the configuration does not allow",
        [CLIENT, WEB, service("shop/web", externalIPs=["198.51.100.7"])],
        "not-served",
        "denied: Service shop/web is not served at 198.51.100.7: its spec.externalIPs[0] is in no range of "
        "the agent's setting external_ips",
        target="198.51.100.7",
    ),
    Case(
        "a Service that another proxy serves",
        [CLIENT, WEB, labelled(service("shop/web"), **ANOTHER_PROXY)],
        "not-served",
        "denied: Service shop/web has the label service.kubernetes.io/service-proxy-name: podwall leaves it "
        "to another proxy",
        target="svc/web",
    ),
    Case(
        "an older Service has the address",
        [CLIENT, WEB, service("shop/web", **AT), aged(service("other/web", **AT))],
        "address-conflict",
        "denied: Service other/web is older and has port 80/TCP of 10.96.9.9, so nothing of it comes to "
        "Service shop/web",
        target="svc/web",
    ),
    Case(
        "a client that the load balancer's source ranges do not hold",
        [WEB, balanced(service("shop/web", **FOR_SOME), "198.51.100.9")],
        "source-ranges",
        "denied: loadBalancerSourceRanges of Service shop/web does not hold 203.0.113.10: it is dropped",
        source="203.0.113.10",
        target="198.51.100.9",
    ),
    Case(
        "a ClusterIP from outside",
        [WEB, service("shop/web", clusterIPs=["10.96.9.9"])],
        "cluster-ip",
        "doubtful: Service shop/web is met at its ClusterIP 10.96.9.9 from inside of the cluster: nothing "
        "leads there from outside, unless somebody routes it to a node, and it has no NodePort",
        source="203.0.113.10",
        target="svc/web",
    ),
    Case(
        "a load balancer's address from outside, by the Service's name",
        [WEB, balanced(service("shop/web", type="LoadBalancer"), "198.51.100.9")],
        "allowed",
        "allowed: 203.0.113.10 (outside the cluster) may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction)",
        source="203.0.113.10",
        target="svc/web",
        allowed=True,
    ),
    Case(
        "a Pod that has no address yet",
        [CLIENT, pod("shop/web", phase="Pending", app="web")],
        "not-running",
        "denied: Pod shop/web has no address yet: it is Pending",
        target="pod/web",
    ),
    Case(
        "a Pod that has ended",
        [CLIENT, pod("shop/web", "10.244.0.3", phase="Succeeded", app="web")],
        "not-running",
        "denied: Pod shop/web has ended: it is Succeeded",
        target="pod/web",
    ),
    Case(
        "a port of the node that a Pod has",
        [CLIENT, host_port(WEB, 18080)],
        "allowed",
        "allowed: Pod shop/client may connect to Pod shop/web on TCP 8080 "
        "(no policy isolates either end in this direction)",
        target="node-1",
        port=18080,
        allowed=True,
    ),
    Case(
        "a headless Service translates no port",
        [CLIENT, WEB, service("shop/web", clusterIP="None")],
        "target-port",
        "doubtful: Service shop/web is headless: its name answers the Pods' own addresses, and nobody "
        "translates port 80 to 8080; connect to that",
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


def test_a_node_that_serves_no_services_has_nothing_to_compare() -> None:
    there = world([CLIENT, WEB, service("shop/web")])
    ends = {"source": there.named("client", "shop"), "target": there.named("svc/web", "shop")}
    served = why(there, Question(**ends, port=80))
    off = why(replace(there, settings={"node-1": ServiceSettings(enabled=False)}), Question(**ends, port=80))

    assert (off.sentence, bool(served.legs), off.legs) == (served.sentence, True, ())
    assert off.steps[-1].text == (
        "podwall serves no Services on node-1 (setting services): another proxy has to"
    )


def test_who_is_seen_behind_a_tunnel() -> None:
    """A node under its tunnel's address, a Pod that asks another node for a port under its own node's."""
    named = {**node("node-1", "192.168.10.1"), "spec": {"podCIDRs": ["10.244.0.0/24"]}}
    port = {"port": 80, "targetPort": 8080, "nodePort": 30080}
    there = world([named, CLIENT, AWAY, service("shop/web", **LOCAL, ports=[port])])
    tunnelled = replace(there, tunnels={"node-1": frozenset({"node-2"})})
    cases = {
        ("node-1", "pod/web", 8080): "10.244.0.0",
        ("client", "node-2", 30080): "192.168.10.1",
        ("client", "pod/web", 8080): None,
    }
    for (source, target, number), seen in cases.items():
        ends = {"source": there.named(source, "shop"), "target": there.named(target, "shop")}
        for asked, wanted in ((there, None), (tunnelled, seen)):
            ((end, _),) = why(asked, Question(**ends, port=number)).targets
            assert str(end.seen_source) == str(wanted), (source, target)


@pytest.mark.parametrize(
    ("target", "port", "said"),
    [
        ("nobody", 80, "is no Pod, Service or node in namespace shop"),
        ("gone/web", 80, "there is no namespace gone"),
        ("other/web", 80, "is not in namespace other, but there is Pod shop/web"),
        ("node-1", None, "which port of Node node-1?"),
        ("www.example.com", 80, "of a name outside of the cluster ask about an address"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_answered(target: str, port: int | str | None, said: str) -> None:
    with pytest.raises((UnknownNameError, CannotAnswerError), match=said.replace("?", r"\?")):
        ask([CLIENT, WEB], "client", target, port)


def test_a_name_that_two_things_have() -> None:
    with pytest.raises(UnknownNameError, match="may be Pod shop/web, Service shop/web: put pod/, svc/"):
        ask([CLIENT, WEB, service("shop/web")], "client", "web")
