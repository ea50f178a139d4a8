"""LoadBalancer Services without a cloud: an address from the pool, from outside, on one node at a time;
another node takes over when that one dies."""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Any

import pytest

from tests.cluster import cluster, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import ClusterError, say, wait_for
from tests.cluster.contents import agnhost_name
from tests.cluster.places import Asker

NAMESPACE = "balanced"
ADMITTED = ("203.0.113.10", "2001:db8:203::10")
MOVES_S = 5.0
EVERYWHERE = "everywhere"


@pytest.fixture(scope="module", autouse=True)
def balanced(real_cluster: Settings) -> Iterator[None]:
    """Run the example, a Service with a Pod on every node, and a Pod to ask from on every node."""
    objects = kube.example("services/load-balancer.yaml", NAMESPACE)
    with kube.running((NAMESPACE,), *objects, *everywhere(), kube.client_daemon(NAMESPACE)):
        yield


def everywhere() -> list[dict[str, Any]]:
    """Return a LoadBalancer Service with a Pod on every node."""
    daemon = kube.client_daemon(NAMESPACE)
    labels = {"app": EVERYWHERE}
    daemon["metadata"]["name"] = EVERYWHERE
    daemon["spec"]["selector"]["matchLabels"] = labels
    daemon["spec"]["template"]["metadata"]["labels"] = labels
    container = daemon["spec"]["template"]["spec"]["containers"][0]
    container |= {"image": agnhost_name(), "args": ["netexec", "--http-port=8080", "--udp-port=-1"]}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": EVERYWHERE, "namespace": NAMESPACE},
        "spec": {
            "type": "LoadBalancer",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": labels,
            "ports": [{"port": 80, "targetPort": 8080}],
        },
    }
    return [daemon, service]


def test_addresses_come_from_the_pool() -> None:
    (pool,) = cluster.site_settings()["load_balancer_pools"]
    for service in ("balanced", "balanced-for-some"):
        given = [ip_address(each) for each in kube.balanced_addresses(NAMESPACE, service)]
        assert sorted(each.version for each in given) == [4, 6]
        for address in given:
            ends = [tuple(map(ip_address, each.split("-"))) for each in pool["addresses"]]
            assert any(first.version == address.version and first <= address <= last for first, last in ends)


def test_outside_pods_and_nodes_reach_it(outside: Asker, nodes: dict[str, Asker]) -> None:
    expected = {pod.name for pod in kube.pods(NAMESPACE, app="balanced")}
    pods = [places.pod(NAMESPACE, pod.name) for pod in kube.pods(NAMESPACE, app="asker")]
    for address in kube.balanced_addresses(NAMESPACE, "balanced"):
        wait_for("an answer", lambda a=address: outside.one(Question(a, 80)).body, limit=20)  # type: ignore[misc]
        for asker in [outside, *pods, *nodes.values()]:
            seen: set[str] = set()

            def followed() -> bool:
                answers = asker.ask([Question(address, 80)] * 30)  # noqa: B023 - called at once
                seen.clear()  # noqa: B023
                seen.update(each.body or each.error for each in answers)  # noqa: B023
                return seen == expected  # noqa: B023

            with contextlib.suppress(ClusterError):
                wait_for(f"{asker.name} to follow", followed, limit=10)
            assert seen == expected, (asker.name, address)


def test_only_admitted_sources_are_heard(outside: Asker) -> None:
    expected = {pod.name for pod in kube.pods(NAMESPACE, app="balanced")}
    addresses = kube.balanced_addresses(NAMESPACE, "balanced-for-some")
    with places.another_address(ADMITTED):
        for address in addresses:
            (source,) = [each for each in ADMITTED if ip_network(each).version == ip_address(address).version]
            question = Question(address, 80, source=source)
            wait_for("an answer", lambda q=question: outside.one(q).body, limit=20)  # type: ignore[misc]
            assert {each.body for each in outside.ask([question] * 20)} == expected
            assert outside.one(Question(address, 80, limit=1)).error == "timeout"


def hardware() -> dict[str, str]:
    """Return the nodes by their hardware addresses."""
    found = {}
    for name in cluster.nodes():
        (link,) = json.loads(cluster.on_node(name, "ip", "-json", "link", "show", "eth0"))
        found[link["address"]] = name
    return found


def holder(address: str, nodes: dict[str, str]) -> str:
    """Return the node that answers for an address, by its hardware address at the outside machine."""
    listed = json.loads(cluster.outside("ip", "-json", "neighbour", "show", address))
    (found,) = [each["lladdr"] for each in listed if "lladdr" in each]
    return nodes[found]


@pytest.fixture
def doomed(outside: Asker) -> Iterator[tuple[str, dict[str, str]]]:
    """Name a worker that answers for an address of the Service, and which node does for each; bring the
    worker back after the test has killed it."""
    addresses = kube.balanced_addresses(NAMESPACE, EVERYWHERE)
    for address in addresses:
        wait_for("an answer", lambda a=address: outside.one(Question(a, 80)).body, limit=20)  # type: ignore[misc]
    known = hardware()
    held = {address: holder(address, known) for address in addresses}
    workers = [name for name in held.values() if "worker" in name]
    assert workers, f"no worker holds an address: {held}"
    victim = workers[0]
    try:
        yield victim, held
    finally:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        cluster.docker("start", victim)
        wait_for("the agent of the node that died", lambda: serves_since(victim, now), limit=120, every=1)
        cluster.await_ready()


def serves_since(node: str, when: str) -> bool:
    """Say whether a node's agent has started after a time and is ready."""
    for pod in kube.get("pods", "--namespace=kube-system", "--selector=app.kubernetes.io/name=podwall"):
        if pod["spec"]["nodeName"] == node:
            status = pod["status"]["containerStatuses"][0]
            return bool(status["ready"] and status["state"]["running"]["startedAt"] >= when)
    return False


def test_an_address_moves_when_its_node_dies(outside: Asker, doomed: tuple[str, dict[str, str]]) -> None:
    """A third of the answers is missing afterwards, because the Pod of that node died as well; not all."""
    victim, held = doomed
    addresses = [address for address, name in held.items() if name == victim]
    known = hardware()
    with places.asking(outside, [Question(each, 80, limit=0.5) for each in addresses], 40) as stream:
        cluster.docker("kill", victim)
        dead_from = max(answer.at for _, answer in stream.so_far() if answer.body)

        def answered() -> bool:
            later = {
                asked.address for asked, each in stream.so_far() if each.body and each.at > dead_from + 0.6
            }
            return later == set(addresses)

        wait_for("another node to answer", answered, limit=30, every=0.1)
        found = stream.end()
    for address in addresses:
        good = sorted(answer.at for asked, answer in found if asked.address == address and answer.body)
        gap = max(later - earlier for earlier, later in pairwise(good))
        say(f"{address}: {gap:.1f} s without an answer after {victim} was killed")
        assert gap < MOVES_S
        assert holder(address, known) != victim
