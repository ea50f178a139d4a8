"""Services on a real cluster without kube-proxy, by the examples' own files: from Pods, from nodes and from
outside, in both families."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

import pytest

from tests.cluster import cluster, kube, places
from tests.cluster.ask import Answer, Question
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.kube import Place
from tests.cluster.places import Asker

NAMESPACE = "services"
FILES = ("cluster-ip", "ports", "node-port", "session-affinity", "no-selector", "client")
LEGACY = "203.0.113.10"
"""Where the Services without a selector lead: an address of the outside machine while these tests run."""
LED_TO = {
    "my-app": {"app": "my-app"},
    "two-ports": {"app": "shop", "version": "1"},
    "named-port": {"app": "shop"},
    "on-nodes": {"app": "on-nodes"},
    "on-nodes-anywhere": {"app": "on-nodes"},
    "spread": {"app": "sessions"},
}
"""Services and the labels of the Pods that they lead every node to."""
AT_ONCE_S = 1.0
REFUSED = {"refused", "forbidden"}
"""What a client is told; the kernel says "forbidden" to a process of the node itself that sends UDP."""
COMMAND_LINE = "/shell?cmd=cat%20/proc/1/cmdline"


@pytest.fixture(scope="module", autouse=True)
def services(real_cluster: Settings, nodes: dict[str, Asker]) -> Iterator[None]:
    """Run the examples and a Pod to ask from on every node."""
    objects = [each for file in FILES for each in kube.example(f"services/{file}.yaml", NAMESPACE)]
    made_first = [each for each in objects if each["kind"] == "Service"]
    rest = [each for each in objects if each["kind"] != "Service"]
    with kube.running((NAMESPACE,), *made_first, *rest, kube.client_daemon(NAMESPACE)):
        leading = {name: {pod.name for pod in serving(**labels)} for name, labels in LED_TO.items()}
        for asker in nodes.values():
            for name, expected in leading.items():
                await_answers(asker, name, expected)
        yield


def await_answers(asker: Asker, service: str, expected: set[str]) -> None:
    """Wait until a node leads to these Pods of a Service and to no other: each node follows by itself."""
    for address in kube.addresses(NAMESPACE, service):
        wait_for(
            f"{asker.name} to lead to the Pods of {service}",
            lambda a=address: names(asker.ask([Question(a, 80)] * 60)) == expected,  # type: ignore[misc]
            limit=20,
        )


@pytest.fixture(scope="module")
def pods(services: None) -> dict[str, Asker]:
    """Return a Pod to ask from on every node."""
    found = kube.pods(NAMESPACE, app="asker")
    return {pod.node: places.pod(NAMESPACE, pod.name) for pod in found}


@pytest.fixture(scope="module")
def inside(pods: dict[str, Asker], nodes: dict[str, Asker]) -> list[Asker]:
    """Return every Pod and node to ask from."""
    return [*pods.values(), *nodes.values()]


def serving(**labels: str) -> list[Place]:
    """Return the ready Pods with these labels."""
    return kube.pods(NAMESPACE, **labels)


def names(answers: Sequence[Answer]) -> set[str]:
    """Return who answered, and the errors."""
    return {each.body or each.error for each in answers}


def test_a_cluster_ip_is_answered_by_every_pod_and_nobody_else(inside: list[Asker]) -> None:
    expected = {pod.name for pod in serving(app="my-app")}
    assert len(expected) == 3
    for address in kube.addresses(NAMESPACE, "my-app"):
        for asker in inside:
            assert names(asker.ask([Question(address, 80)] * 60)) == expected, (asker.name, address)


def test_a_cluster_ip_spreads_about_evenly(inside: list[Asker]) -> None:
    for address in kube.addresses(NAMESPACE, "my-app"):
        found = Counter(each.body for each in inside[0].ask([Question(address, 80)] * 300))
        # five standard deviations of 300 draws of one in three
        assert all(60 <= count <= 140 for count in found.values()), found


def test_a_pods_own_address_is_seen_through_a_cluster_ip(pods: dict[str, Asker]) -> None:
    for pod in kube.pods(NAMESPACE, app="asker"):
        for address in kube.addresses(NAMESPACE, "my-app"):
            seen = {each.body for each in pods[pod.node].ask([Question(address, 80, "/clientip")] * 12)}
            own = {each for each in pod.addresses if each.version == ip_address(address).version}
            assert {kube.client(each) for each in seen} == own


def test_a_pod_reaches_itself_through_its_service() -> None:
    for pod in serving(app="my-app"):
        asker = places.pod(NAMESPACE, pod.name)
        for address in kube.addresses(NAMESPACE, "my-app"):
            assert pod.name in names(asker.ask([Question(address, 80)] * 40))


def test_each_port_reaches_its_own(pods: dict[str, Asker]) -> None:
    asker = next(iter(pods.values()))
    for address in kube.addresses(NAMESPACE, "two-ports"):
        for port, own in ((80, 8080), (9090, 9090)):
            answers = asker.ask([Question(address, port, COMMAND_LINE)] * 20)
            assert all(f"--http-port={own}" in each.body for each in answers), (address, port)


def test_a_port_by_name_is_another_number_on_other_pods(pods: dict[str, Asker]) -> None:
    asker = next(iter(pods.values()))
    expected = {pod.name for pod in serving(app="shop")}
    for address in kube.addresses(NAMESPACE, "named-port"):
        assert names(asker.ask([Question(address, 80)] * 60)) == expected
        lines = [each.body for each in asker.ask([Question(address, 80, COMMAND_LINE)] * 60)]
        ports = {found[1] for line in lines if (found := re.search(r"--http-port=(\d+)", line))}
        assert ports == {"8080", "8081"}


def test_a_node_port_answers_on_every_node_from_everywhere(inside: list[Asker], outside: Asker) -> None:
    expected = {pod.name for pod in serving(app="on-nodes")}
    assert len(expected) == 1
    questions = [Question(str(each), 30080) for node in kube.nodes() for each in node.addresses]
    for asker in [*inside, outside]:
        assert [each.body or each.error for each in asker.ask(questions)] == [*expected] * len(questions), (
            asker.name
        )


def test_a_node_port_does_not_answer_on_loopback(nodes: dict[str, Asker]) -> None:
    for asker in nodes.values():
        answers = asker.ask([Question("127.0.0.1", 30080, limit=2), Question("::1", 30080, limit=2)])
        assert not any(each.body for each in answers), asker.name


def test_an_omitted_node_port_is_given_one(outside: Asker) -> None:
    port = kube.get("service", "on-nodes-anywhere", f"--namespace={NAMESPACE}")[0]["spec"]["ports"][0]
    assert 30000 <= port["nodePort"] <= 32767
    addresses = [each for node in kube.nodes() for each in node.addresses]
    answers = outside.ask([Question(str(each), port["nodePort"]) for each in addresses])
    assert names(answers) == {pod.name for pod in serving(app="on-nodes")}


@pytest.fixture
def legacy(outside: Asker) -> Iterator[str]:
    """Let the outside machine have the address that the Services without a selector name, and serve there."""
    with places.another_address([LEGACY]):
        words = ["/agnhost", "netexec", "--http-port=80", "--udp-port=-1"]
        cluster.docker("exec", "--detach", cluster.OUTSIDE, *words)
        try:
            yield wait_for("the server on port 80", lambda: outside.one(Question(LEGACY, 80)).body, limit=20)
        finally:
            cluster.docker("exec", "--privileged", cluster.OUTSIDE, "pkill", "-f", "http-port=80 ")


@pytest.mark.parametrize("service", ["legacy", "older-legacy"])
def test_a_service_without_selector_leads_outside(
    service: str, legacy: str, pods: dict[str, Asker], nodes: dict[str, Asker]
) -> None:
    (address,) = kube.addresses(NAMESPACE, service)
    own = {node.name: node.addresses for node in kube.nodes()}
    for name, asker in [*pods.items(), *nodes.items()]:
        answers = asker.ask([Question(address, 80), Question(address, 80, "/clientip")])
        assert answers[0].body == legacy, (asker.name, answers[0])
        assert kube.client(answers[1].body) in own[name], asker.name


def test_affinity_none_spreads_and_client_ip_sticks(inside: list[Asker]) -> None:
    expected = {pod.name for pod in serving(app="sessions")}
    for asker in inside:
        for spread in kube.addresses(NAMESPACE, "spread"):
            assert names(asker.ask([Question(spread, 80)] * 60)) == expected
        for sticky in kube.addresses(NAMESPACE, "sticky"):
            assert len(names(asker.ask([Question(sticky, 80)] * 60))) == 1, asker.name


def test_affinity_survives_other_endpoints(pods: dict[str, Asker]) -> None:
    address = kube.addresses(NAMESPACE, "sticky")[0]
    first = {asker.name: asker.one(Question(address, 80)).body for asker in pods.values()}
    keep = ["annotate", "--overwrite", "pod", *set(first.values())]
    cluster.kubectl("-n", NAMESPACE, *keep, "controller.kubernetes.io/pod-deletion-cost=1000")
    for replicas in (6, len(set(first.values())), 3):
        cluster.kubectl("-n", NAMESPACE, "scale", "deployment/sessions", f"--replicas={replicas}")
        kube.wait_for_pods(NAMESPACE, replicas, app="sessions")
        for asker in pods.values():
            assert names(asker.ask([Question(address, 80)] * 10)) == {first[asker.name]}, replicas


def test_affinity_ends_with_its_time(pods: dict[str, Asker]) -> None:
    """Asked again within two seconds it is the same Pod; asked every three, another one comes."""
    asker = next(iter(pods.values()))
    address = kube.addresses(NAMESPACE, "briefly-sticky")[0]
    assert len(names(asker.ask([Question(address, 80)] * 30))) == 1
    seen: set[str] = set()

    def look() -> bool:
        seen.add(asker.one(Question(address, 80)).body)
        return len(seen) > 1

    wait_for("another Pod's answer", look, limit=45, every=3)


def test_services_are_in_a_pods_environment(pods: dict[str, Asker]) -> None:
    asker = next(iter(pods.values()))
    found = dict(line.split("=", 1) for line in kube.execute(NAMESPACE, asker.name, "env").splitlines())
    assert found["MY_APP_SERVICE_HOST"] == kube.addresses(NAMESPACE, "my-app")[0]
    assert found["MY_APP_SERVICE_PORT"] == "80"
    assert asker.one(Question(found["MY_APP_SERVICE_HOST"], int(found["MY_APP_SERVICE_PORT"]))).body


def test_kubectl_describes_a_service_and_its_endpoints() -> None:
    said = cluster.kubectl("-n", NAMESPACE, "describe", "service", "my-app")
    own = {str(each) for pod in serving(app="my-app") for each in pod.addresses}
    line = next(line for line in said.splitlines() if line.startswith("Endpoints:"))
    shown = {each.strip("[]") for each in re.findall(r"([^,\s]+):8080", line)}
    assert shown
    assert shown <= own
    assert kube.addresses(NAMESPACE, "my-app")[0] in said
    listed = json.loads(cluster.kubectl("-n", NAMESPACE, "get", "endpoints", "my-app", "-o", "json"))
    assert len(listed["subsets"][0]["addresses"]) == 3


def await_refusals(asker: Asker, questions: Sequence[Question]) -> None:
    """Wait until nobody waits for a time-out: a node follows by itself, and this machine may be busy."""

    def look() -> bool:
        return all(each.error in REFUSED and each.seconds < AT_ONCE_S for each in asker.ask(questions))

    wait_for(f"{asker.name} to be refused at once", look, limit=10)


BROKEN = (
    ("no-endpoints", {"app": "nobody"}, 8080),
    ("wrong-target-port", {"app": "my-app"}, 8099),
)


@pytest.mark.parametrize(("name", "selector", "target"), BROKEN, ids=[each[0] for each in BROKEN])
def test_a_broken_service_refuses_at_once(
    name: str, selector: dict[str, str], target: int, inside: list[Asker], outside: Asker
) -> None:
    """Nobody waits for a time-out: not at a ClusterIP, not at a NodePort, not over UDP."""
    ports = [
        {"name": each.lower(), "protocol": each, "port": 80, "targetPort": target} for each in ("TCP", "UDP")
    ]
    spec = {"type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "selector": selector, "ports": ports}
    metadata = {"name": name, "namespace": NAMESPACE}
    kube.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
    given = kube.get("service", name, f"--namespace={NAMESPACE}")[0]["spec"]
    (node_port, _) = [each["nodePort"] for each in given["ports"]]
    at_nodes = [Question(str(each), node_port) for node in kube.nodes() for each in node.addresses]
    at_service = [
        Question(each, 80, protocol=protocol) for each in given["clusterIPs"] for protocol in ("tcp", "udp")
    ]

    for asker, questions in [*[(each, at_service + at_nodes) for each in inside], (outside, at_nodes)]:
        await_refusals(asker, questions)
        assert {each.error for each in asker.ask(questions)} <= REFUSED, asker.name


def test_a_port_that_no_service_has_is_refused_at_once(inside: list[Asker]) -> None:
    questions = [Question(each, 81) for each in kube.addresses(NAMESPACE, "my-app")]
    for asker in inside:
        await_refusals(asker, questions)
        assert {each.error for each in asker.ask(questions)} == {"refused"}, asker.name
