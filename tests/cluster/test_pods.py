"""Ten Pods over the nodes of real Kubernetes: every pair, nodes, the outside, and nothing left of them."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from tests.cluster import cluster, kube, node_state
from tests.cluster.cluster import Settings
from tests.cluster.console import ClusterError, wait_for
from tests.cluster.contents import agnhost_name
from tests.cluster.kube import Place

NAMESPACE = "podwall-pods"
REPLICAS = 10
PORT = 8080
NODE_PORT = 18080
VERSIONS = (4, 6)


def served(name: str, port: int, **more: object) -> dict[str, object]:
    """Return a Pod template that serves over HTTP and is probed there."""
    probe = {"httpGet": {"path": "/hostname", "port": port}, "periodSeconds": 2}
    container = {
        "name": "agnhost",
        "image": agnhost_name(),
        "args": ["netexec", f"--http-port={port}", "--udp-port=-1"],
        "readinessProbe": probe,
        "livenessProbe": probe,
    }
    spec = {
        "containers": [container],
        "terminationGracePeriodSeconds": 1,
        "tolerations": [{"operator": "Exists"}],
        **more,
    }
    return {"metadata": {"labels": {"app": name}}, "spec": spec}


def workload(kind: str, name: str, template: dict[str, object], **more: object) -> dict[str, object]:
    """Return a Deployment or DaemonSet."""
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": template, **more},
    }


@pytest.fixture(scope="module")
def before(real_cluster: Settings) -> dict[str, dict[str, object]]:
    """Tell what podwall has made on each node before there is a Pod of these tests."""
    return {node.name: node_state.everything(node.name) for node in kube.nodes()}


@pytest.fixture(scope="module")
def pods(before: dict[str, dict[str, object]]) -> Iterator[list[Place]]:
    """Run ten Pods spread over the nodes, and a server in each node's own network."""
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "ten"}},
    }
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    try:
        ten = served("ten", PORT, topologySpreadConstraints=[spread])
        kube.apply(
            workload("Deployment", "ten", ten, replicas=REPLICAS),
            workload("DaemonSet", "on-node", served("on-node", NODE_PORT, hostNetwork=True)),
        )
        kube.wait_for_pods(NAMESPACE, len(before), limit=90, app="on-node")
        yield kube.wait_for_pods(NAMESPACE, REPLICAS, limit=90, app="ten")
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", limit=120)


def address(place: Place, version: int) -> IPv4Address | IPv6Address:
    """Return a place's address in one family."""
    return next(each for each in place.addresses if each.version == version)


def test_nodes_become_ready_with_the_manifest_alone(real_cluster: Settings) -> None:
    listed = kube.get("nodes")
    assert len(listed) == real_cluster.nodes
    for node in listed:
        assert kube.condition(node, "Ready"), node["metadata"]["name"]
        unavailable = [each for each in node["status"]["conditions"] if each["type"] == "NetworkUnavailable"]
        assert [each["status"] for each in unavailable] == ["False"]


def test_pods_are_spread_and_have_both_families(pods: list[Place]) -> None:
    assert len({pod.node for pod in pods}) >= 2
    assert all(tuple(sorted(each.version for each in pod.addresses)) == VERSIONS for pod in pods)
    every = [each for pod in pods for each in pod.addresses]
    assert len(set(every)) == len(every)


def test_every_pair_connects_with_its_own_address(pods: list[Place]) -> None:
    wrong = []
    for source in pods:
        urls = {
            kube.url(each, PORT, path): (target, each)
            for target in pods
            for each in target.addresses
            for path in ("hostname", "clientip")
        }
        found = kube.answers(kube.execute(NAMESPACE, source.name, *kube.fetch_all(list(urls))))
        for url, (target, each) in urls.items():
            own = address(source, each.version)
            good = (
                found[url] == target.name
                if url.endswith("hostname")
                else not found[url].startswith("curl") and kube.client(found[url]) == own
            )
            if not good:
                wrong.append(f"{source.name} on {source.node} to {target.node} {url}: {found[url]}")
    assert not wrong, "\n".join(wrong)


def test_pods_reach_nodes_unmasqueraded(pods: list[Place], real_cluster: Settings) -> None:
    for source in first_on_each_node(pods):
        urls = {
            kube.url(each, NODE_PORT, "clientip"): each.version
            for node in kube.nodes()
            for each in node.addresses
        }
        found = kube.answers(kube.execute(NAMESPACE, source.name, *kube.fetch_all(list(urls))))
        seen = {url: str(kube.client(answer)) for url, answer in found.items()}
        assert seen == {url: str(address(source, version)) for url, version in urls.items()}


def test_nodes_reach_pods(pods: list[Place]) -> None:
    urls = {kube.url(each, PORT, "hostname"): pod.name for pod in pods for each in pod.addresses}
    for node in kube.nodes():
        assert kube.answers(cluster.on_node(node.name, *kube.fetch_all(list(urls)))) == urls, node.name


@pytest.mark.parametrize("version", VERSIONS)
def test_outside_sees_the_nodes_address(pods: list[Place], version: int) -> None:
    outside = cluster.outside_address(version)
    nodes = {node.name: node for node in kube.nodes()}
    for source in first_on_each_node(pods):
        url = kube.url(outside, PORT, "clientip")
        answer = kube.answers(kube.execute(NAMESPACE, source.name, *kube.fetch_all([url])))[url]
        assert kube.client(answer) == address(nodes[source.node], version), source


def test_exec_and_logs(pods: list[Place]) -> None:
    for pod in first_on_each_node(pods):
        assert kube.execute(NAMESPACE, pod.name, "hostname").strip() == pod.name
        assert "Started HTTP server" in cluster.kubectl("--namespace", NAMESPACE, "logs", pod.name)


def test_probes_decide_readiness(pods: list[Place]) -> None:
    """The Pods are Ready by their probes; one that answers its probe with an error is not."""
    bad = served("bad", PORT)
    container = bad["spec"]["containers"][0]  # type: ignore[index]
    del container["livenessProbe"]
    # agnhost is not healthy without its UDP server
    container["readinessProbe"] = {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 1}
    kube.apply(
        {"apiVersion": "v1", "kind": "Pod", **bad, "metadata": {"name": "bad", "namespace": NAMESPACE}}
    )

    def refused() -> bool:
        events = kube.get("events", f"--namespace={NAMESPACE}", "--field-selector=involvedObject.name=bad")
        return any("statuscode: 412" in each["message"] for each in events)

    wait_for("the kubelet's word that the probe failed", refused, limit=60)
    assert not kube.condition(kube.get("pod", "bad", f"--namespace={NAMESPACE}")[0], "Ready")


def test_nothing_is_left_of_deleted_pods(pods: list[Place], before: dict[str, dict[str, object]]) -> None:
    cluster.kubectl("delete", "namespace", NAMESPACE, limit=120)
    for node, state in before.items():
        wait_for_equal(node, state)


def first_on_each_node(pods: list[Place]) -> list[Place]:
    """Return one Pod of each node."""
    return list({pod.node: pod for pod in reversed(pods)}.values())


def wait_for_equal(node: str, wanted: dict[str, object]) -> None:
    """Wait until a node holds what it held, and name the difference when it does not come to that."""
    seen: dict[str, object] = {}

    def look() -> bool:
        seen.update(node_state.everything(node))
        return seen == wanted

    try:
        wait_for(f"{node} to hold what it held before", look, limit=60, every=1)
    except ClusterError:
        for kind, value in wanted.items():
            assert seen[kind] == value, f"{node}: {kind}"
