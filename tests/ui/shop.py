"""A shop of 30 Pods in six namespaces: who talks to whom in it, and what its policies deny."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lab import probe
from lab.limits import SLOWNESS
from lab.objects import Object, check
from lab.world import Lab, LabPod
from tests.lab.following import every_node_follows

LIMIT = 10.0 * SLOWNESS
SERVING = {"http": 8080, "metrics": 9090}


@dataclass(frozen=True, slots=True)
class Workload:
    """So many replicas of one Pod."""

    namespace: str
    name: str
    replicas: int
    ports: dict[str, int]
    kind: str = "Deployment"

    @property
    def path(self) -> str:
        return f"{self.namespace}/{self.name}"


WORKLOADS = (
    Workload("edge", "gateway", 3, SERVING),
    Workload("shop", "storefront", 4, SERVING),
    Workload("shop", "cart", 3, SERVING),
    Workload("shop", "search", 2, SERVING),
    Workload("shop", "recommendations", 2, SERVING),
    Workload("orders", "checkout", 3, SERVING),
    Workload("orders", "ledger", 2, SERVING),
    Workload("orders", "payments", 2, SERVING),
    Workload("orders", "mailer", 1, SERVING),
    Workload("data", "postgres", 2, {"postgres": 5432, "metrics": 9090}, "StatefulSet"),
    Workload("data", "redis", 2, {"redis": 6379, "metrics": 9090}, "StatefulSet"),
    Workload("data", "queue", 1, {"amqp": 5672, "metrics": 9090}, "StatefulSet"),
    Workload("monitoring", "prometheus", 1, {"http": 9090}),
    Workload("monitoring", "grafana", 1, {"http": 3000}),
    Workload("reports", "nightly", 1, {"http": 8080}),
)

ALLOWED = (
    ("edge/gateway", "shop/storefront", 8080),
    ("shop/storefront", "shop/cart", 8080),
    ("shop/storefront", "shop/search", 8080),
    ("shop/storefront", "shop/recommendations", 8080),
    ("shop/cart", "orders/checkout", 8080),
    ("shop/cart", "data/redis", 6379),
    ("shop/search", "data/postgres", 5432),
    ("shop/recommendations", "data/redis", 6379),
    ("orders/checkout", "orders/ledger", 8080),
    ("orders/checkout", "orders/payments", 8080),
    ("orders/checkout", "data/queue", 5672),
    ("orders/ledger", "data/postgres", 5432),
    ("orders/payments", "data/postgres", 5432),
    ("orders/mailer", "data/queue", 5672),
    ("monitoring/grafana", "monitoring/prometheus", 9090),
    *(("monitoring/prometheus", of.path, 9090) for of in WORKLOADS if of.ports.get("metrics")),
)
DENIED = (("reports/nightly", "data/postgres", 5432),)
DENIED_LATER = (
    ("shop/recommendations", "orders/payments", 8080),
    ("monitoring/grafana", "data/postgres", 5432),
)
"""From each replica to each."""


@contextmanager
def running(nodes: int) -> Iterator[Lab]:
    """A lab with the shop, its policies in force.

    They come when every node knows every Pod: one that has just started may be denied for a moment by a node
    that has not heard of it, and pictures and tests would show that.
    """
    given = objects()
    with Lab(nodes=nodes, given=[item for item in given if item["kind"] != "NetworkPolicy"]) as lab:
        every_node_follows(lab)
        lab.apply(given)
        every_node_follows(lab)
        deadline = time.monotonic() + LIMIT
        while set(talk(lab, DENIED)) != {probe.SILENT}:
            assert time.monotonic() < deadline, "the policies of the shop are not in force"
        yield lab


def objects() -> list[Object]:
    """The whole shop."""
    spaces = dict.fromkeys(of.namespace for of in WORKLOADS)
    namespaces = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in spaces]
    services = [_service(of) for of in WORKLOADS]
    everything = (*namespaces, *map(_workload, WORKLOADS), *services, *policies())
    return [check(item, "the shop") for item in everything]


def policies() -> Iterator[Object]:
    """What may happen, and nothing else where it matters."""
    yield _policy(
        "data/postgres",
        "postgres",
        [_from({"orders": None, "shop": "search"}, 5432), _from({"monitoring": "prometheus"}, 9090)],
    )
    yield _policy(
        "data/redis", "redis", [_from({"shop": None}, 6379), _from({"monitoring": "prometheus"}, 9090)]
    )
    yield _policy(
        "data/queue", "queue", [_from({"orders": None}, 5672), _from({"monitoring": "prometheus"}, 9090)]
    )
    yield _policy(
        "orders/payments",
        "payments",
        [_from({"orders": "checkout"}, 8080), _from({"monitoring": "prometheus"}, 9090)],
    )
    yield _policy(
        "shop/from-the-edge",
        "storefront",
        [_from({"edge": "gateway"}, 8080), _from({"monitoring": "prometheus"}, 9090)],
    )
    mail = {"to": [{"ipBlock": {"cidr": "198.51.100.0/24"}}], "ports": [{"protocol": "TCP", "port": 25}]}
    queue = {"to": [_peer("data", "queue")], "ports": [{"protocol": "TCP", "port": 5672}]}
    egress = _policy("orders/mailer", "mailer", [])
    egress["spec"] = {
        "podSelector": {"matchLabels": {"app": "mailer"}},
        "policyTypes": ["Egress"],
        "egress": [queue, mail],
    }
    yield egress


def talk(
    lab: Lab, talks: Iterable[tuple[str, str, int]], times: int = 1, *, by_service: bool = False
) -> list[str]:
    """Connect every replica to every replica, so often; what was seen of each, in order.

    by_service: as many connections, but to the Service's address.
    """
    pods: dict[str, list[LabPod]] = {}
    for pod in lab.pods():
        name = next(
            of.name
            for of in WORKLOADS
            if of.namespace == pod.namespace and pod.name.startswith(f"{of.name}-")
        )
        pods.setdefault(f"{pod.namespace}/{name}", []).append(pod)
    tried = [
        probe.Probe(source.netns, (lab.service(other) if by_service else target).address(4), port)
        for one, other, port in talks
        for source in pods[one]
        for target in pods[other]
        for _ in range(times)
    ]
    return [outcome.verdict for outcome in probe.run(tried)]


def _workload(of: Workload) -> dict[str, Any]:
    labels = {"app": of.name}
    ports = [{"name": name, "containerPort": port} for name, port in of.ports.items()]
    return {
        "apiVersion": "apps/v1",
        "kind": of.kind,
        "metadata": {"namespace": of.namespace, "name": of.name},
        "spec": {
            "replicas": of.replicas,
            "serviceName": of.name,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": of.name, "image": "shop", "ports": ports}]},
            },
        },
    }


def _service(of: Workload) -> dict[str, Any]:
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in of.ports.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": of.namespace, "name": of.name},
        "spec": {"selector": {"app": of.name}, "ports": ports},
    }


def _policy(path: str, app: str, ingress: list[dict[str, Any]]) -> dict[str, Any]:
    namespace, name = path.split("/")
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "podSelector": {"matchLabels": {"app": app}},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


def _from(who: dict[str, str | None], port: int) -> dict[str, Any]:
    peers = [_peer(namespace, app) for namespace, app in who.items()]
    return {"from": peers, "ports": [{"protocol": "TCP", "port": port}]}


def _peer(namespace: str, app: str | None) -> dict[str, Any]:
    peer: dict[str, Any] = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    if app:
        peer["podSelector"] = {"matchLabels": {"app": app}}
    return peer
