"""Connections that are broken on the real cluster, each in another way: the client meets it, and the first
line of `podwall why` names it. The objects are those of examples/troubleshooting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import cluster, command, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import ClusterError, wait_for
from tests.cluster.places import Asker

NAMESPACES = ("broken", "broken-clients")
SILENCE_S = 2.0

CASES = [
    ("client", "empty", "refused", "has no selector, and no EndpointSlice has an address at its port 80"),
    ("client", "misspelt", "refused", "has the labels app=wbe that Service broken/misspelt selects"),
    (
        "client",
        "wrong-name",
        "refused",
        "to targetPort 'https', a name that no container of its Pods declares",
    ),
    ("client", "wrong-number", "refused", "to targetPort 8081, which no container of its Pods declares"),
    (
        "client",
        "guarded",
        "timeout",
        "its podSelector asks for app=friend, but Pod broken/client has app=client",
    ),
    ("prisoner", "for-all", "timeout", "egress policy broken/database-only of Pod broken/prisoner"),
    (
        "broken-clients/client",
        "for-team",
        "timeout",
        "its namespaceSelector asks for team=web, but namespace broken-clients has team=frontend",
    ),
    (
        "client",
        "lost",
        "timeout",
        "broken-clients/client-in would, but it stands in namespace broken-clients, where it selects no Pod",
    ),
    (
        "client",
        "unnamed",
        "timeout",
        "its port 'metrics' is a name that no container of Pod broken/unnamed declares",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def broken(real_cluster: Settings) -> Iterator[None]:
    """Run the examples; their Namespaces have labels that matter."""
    objects = [
        each
        for file in ("broken", "policies")
        for each in kube.example(f"troubleshooting/{file}.yaml", "broken")
    ]
    with kube.running(NAMESPACES, *objects):
        kube.apply(*[each for each in objects if each["kind"] == "Namespace"])
        yield


def asker(name: str) -> Asker:
    """Return a Pod to ask from."""
    namespace, _, pod = name.rpartition("/")
    return places.pod(namespace or "broken", pod)


@pytest.mark.parametrize(("source", "target", "seen", "said"), CASES, ids=[case[1] for case in CASES])
def test_the_first_line_names_the_cause(source: str, target: str, seen: str, said: str) -> None:
    address = kube.addresses("broken", target)[0]
    answer = command.why("broken", source, f"svc/{target}:80")  # waits until the nodes on the way follow

    assert asker(source).one(Question(address, 80, limit=SILENCE_S)).error == seen
    assert not answer["allowed"]
    assert said in answer["sentence"]
    assert answer["nodes"], "nobody compared it with the rules"


def test_a_name_that_a_policy_lets_nobody_look_up() -> None:
    """By its address the Service answers; its name is never told."""
    address = kube.addresses("broken", "for-all")[0]
    lookup = ["dig", "+short", "+time=1", "+tries=1", "for-all.broken.svc.cluster.local", "A"]

    assert command.why("broken", "nameless", f"{address}:80")["allowed"]
    assert asker("nameless").one(Question(address, 80)).body == "web"
    wait_for("its name", lambda: kube.execute("broken", "client", *lookup).strip() == address, limit=10)
    with pytest.raises(ClusterError):
        kube.execute("broken", "nameless", *lookup)
    answer = command.why("broken", "nameless", "for-all.broken.svc.cluster.local:80")
    assert (answer["allowed"], answer["cause"]) == (False, "dns-denied")
    assert "broken/nameless may not ask the cluster's DNS" in answer["sentence"]
    assert "broken/forgot-dns" in answer["sentence"]


def test_a_node_port_closed_by_its_traffic_policy(outside: Asker) -> None:
    there = kube.get("pod", "web", "-n", "broken")[0]["spec"]["nodeName"]
    (port,) = kube.get("service", "local-only", "-n", "broken")[0]["spec"]["ports"]
    client = str(cluster.outside_address(4))
    for node in kube.nodes():
        question = Question(str(node.addresses[0]), port["nodePort"], limit=SILENCE_S)
        said = command.why("broken", client, f"node/{node.name}:{port['nodePort']}")
        answer = outside.one(question)
        if node.name == there:
            assert (answer.body, said["allowed"]) == ("web", True)
        else:
            assert (answer.error, said["cause"]) == ("timeout", "traffic-policy-local")
            assert f"externalTrafficPolicy: Local and no ready endpoint on {node.name}" in said["sentence"]
