"""A client and a stranger on one node of the real cluster; on another a server that admits the client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.cluster import kube, places
from tests.cluster.ask import Question
from tests.cluster.console import wait_for
from tests.cluster.contents import agnhost_name

PORT = 8080


def objects(namespace: str) -> list[dict[str, Any]]:
    """The Pods, the Service `server` at port 80, and the policy `client-only`."""
    names = sorted(node.name for node in kube.nodes())
    places = {"client": names[0], "stranger": names[0], "server": names[-1]}
    meta = {"namespace": namespace}
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**meta, "name": name, "labels": {"app": name}},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 1,
                "tolerations": [{"operator": "Exists"}],
                "containers": [
                    {
                        "name": "agnhost",
                        "image": agnhost_name(),
                        "args": ["netexec", f"--http-port={PORT}", "--udp-port=-1"],
                        "ports": [{"containerPort": PORT}],
                    }
                ],
            },
        }
        for name, node in places.items()
    ]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**meta, "name": "server"},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": PORT}]},
    }
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {**meta, "name": "client-only"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
        },
    }
    return [*pods, service, policy]


@contextmanager
def running(namespace: str) -> Iterator[str]:
    """Run them in a namespace made for them; the Service's address, once it answers the client."""
    with kube.running([namespace], *objects(namespace)):
        address: str = kube.get("service", "-n", namespace, "server")[0]["spec"]["clusterIP"]
        client = places.pod(namespace, "client")
        wait_for(
            "the Service", lambda: client.one(Question(address, 80, limit=1.0)).body == "server", limit=30
        )
        yield address
