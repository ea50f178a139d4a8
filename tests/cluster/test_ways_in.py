"""NetworkPolicy decides on the Pods' own addresses, whichever way a packet came: through a ClusterIP, a port
of any node, a LoadBalancer address, from the Pod itself, from outside."""

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from tests.cluster import kube, places
from tests.cluster.ask import Answer, Question
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.places import Asker

NAMESPACE = "guarded"
ADMITTED = ("203.0.113.10", "2001:db8:203::10")
"""Addresses outside that the policy names."""
API_PORT = 8080
CLUSTER_PORT, LOCAL_PORT = 30016, 30017
SILENCE_S = 1.0


@pytest.fixture(scope="module", autouse=True)
def guarded(real_cluster: Settings, nodes: dict[str, Asker]) -> Iterator[None]:
    """Run the example, and wait until every node has its Services: then nobody is refused any more."""
    with kube.running((NAMESPACE,), *kube.example("services/policy.yaml", NAMESPACE)):
        listed = [
            address
            for service in ("api", "api-local")
            for give in (kube.addresses, kube.balanced_addresses)
            for address in give(NAMESPACE, service)
        ]
        questions = [Question(each, 80, limit=SILENCE_S) for each in listed]

        def served() -> bool:
            found = [each for asker in nodes.values() for each in asker.ask(questions)]
            return all(each.body or each.error == "timeout" for each in found)

        wait_for("every node to have the Services", served, limit=30)
        wait_for("every node to know the friend", friend_is_known, limit=20)
        yield


def friend_is_known() -> bool:
    """Say whether every guarded Pod answers the friend."""
    straight = [str(each) for pod in kube.pods(NAMESPACE, app="api") for each in pod.addresses]
    questions = [Question(each, API_PORT, limit=SILENCE_S) for each in straight]
    return all(each.body for each in places.pod(NAMESPACE, "friend").ask(questions))


def ways(asker: Asker, path: str = "/hostname") -> list[Question]:
    """Return every way that leads a Pod to those of the Services, in both families.

    A NodePort with externalTrafficPolicy Local is one only at a node that has such a Pod, or the asker's own.
    """
    there = {pod.node for pod in kube.pods(NAMESPACE, app="api")}
    there |= {pod.node for pod in kube.pods(NAMESPACE) if pod.name == asker.name}
    found = []
    for service in ("api", "api-local"):
        addresses = kube.addresses(NAMESPACE, service) + kube.balanced_addresses(NAMESPACE, service)
        found += [Question(each, 80, path, limit=SILENCE_S) for each in addresses]
    for port in (CLUSTER_PORT, LOCAL_PORT):
        for node in kube.nodes():
            if port == CLUSTER_PORT or node.name in there:
                found += [Question(str(each), port, path, limit=SILENCE_S) for each in node.addresses]
    return found


def wrong(asker: Asker, questions: list[Question], expected: set[str], times: int = 6) -> list[str]:
    """Ask each question some times and say which answers or errors were not among those expected."""
    return [
        f"{asker.name} to {question.address}:{question.port}: {answer}"
        for question, answer in zip(questions * times, asker.ask(questions * times), strict=True)
        if (answer.error or answer.body) not in expected
    ]


def apis() -> set[str]:
    """Return the guarded Pods."""
    return {pod.name for pod in kube.pods(NAMESPACE, app="api")}


def test_a_friend_is_admitted_by_every_way() -> None:
    asker = places.pod(NAMESPACE, "friend")
    found = wrong(asker, ways(asker), apis())
    assert not found, "\n".join(found)


def test_a_pod_reaches_itself_and_its_like_by_every_way() -> None:
    for name in apis():
        asker = places.pod(NAMESPACE, name)
        found = wrong(asker, ways(asker), apis())
        assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["stranger", "prisoner"])
def test_others_are_denied_by_every_way(name: str) -> None:
    asker = places.pod(NAMESPACE, name)
    found = wrong(asker, ways(asker), {"timeout"}, times=2)
    assert not found, "\n".join(found)


def test_a_friends_own_address_is_seen_by_every_way() -> None:
    (friend,) = kube.pods(NAMESPACE, app="friend")
    asker = places.pod(NAMESPACE, "friend")
    questions = ways(asker, "/clientip")
    for question, answer in zip(questions, asker.ask(questions), strict=True):
        assert answer.body, (question, answer)
        assert kube.client(answer.body) in friend.addresses, question


@pytest.fixture
def admitted(outside: Asker) -> Iterator[tuple[str, ...]]:
    """Let the outside machine ask from addresses that the policy names."""
    with places.another_address(ADMITTED):
        yield ADMITTED


def from_source(addresses: list[str], port: int, path: str) -> list[Question]:
    """Return questions from an admitted address of the same family."""
    source = {ip_address(each).version: each for each in ADMITTED}
    return [
        Question(each, port, path, source=source[ip_address(each).version], limit=SILENCE_S)
        for each in addresses
    ]


def test_outside_is_admitted_by_its_own_address_with_policy_local(
    outside: Asker, admitted: tuple[str, ...]
) -> None:
    """externalTrafficPolicy Local keeps the address; nodes without a Pod of it say nothing."""
    with_pods = {pod.node for pod in kube.pods(NAMESPACE, app="api")}
    balanced = kube.balanced_addresses(NAMESPACE, "api-local")

    def served() -> bool:
        return all(each.body for each in outside.ask(from_source(balanced, 80, "/clientip")))

    wait_for("the LoadBalancer address of api-local", served, limit=20)
    questions = from_source(balanced, 80, "/clientip")
    for node in kube.nodes():
        own = [str(each) for each in node.addresses]
        if node.name in with_pods:
            questions += from_source(own, LOCAL_PORT, "/clientip")
        else:
            assert errors(outside.ask(from_source(own, LOCAL_PORT, "/clientip"))) == {"timeout"}, node.name
    for question, answer in zip(questions, outside.ask(questions), strict=True):
        assert answer.body, (question, answer)
        assert str(kube.client(answer.body)) == question.source


def errors(answers: list[Answer]) -> set[str]:
    """Return the errors, an empty one for an answer."""
    return {each.error for each in answers}


def test_outside_is_denied_by_another_address(outside: Asker) -> None:
    addresses = kube.balanced_addresses(NAMESPACE, "api-local") + kube.balanced_addresses(NAMESPACE, "api")
    questions = [Question(each, 80, limit=SILENCE_S) for each in addresses]
    questions += [
        Question(str(each), port, limit=SILENCE_S)
        for node in kube.nodes()
        for each in node.addresses
        for port in (CLUSTER_PORT, LOCAL_PORT)
    ]
    assert errors(outside.ask(questions)) == {"timeout"}
