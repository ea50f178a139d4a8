"""HTTPRoutes of the Gateway API on podwall's network: paths, headers, and weights over 1,000 requests."""

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cluster import cluster, contents, kube
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import wait_for
from tests.cluster.places import Asker

CONTROLLER, SHOP = "gateway", "shop-routes"
HOST = "shop.example.com"
CANARY = (("x-version", "canary"),)
REQUESTS = 1000


@pytest.fixture(scope="module", autouse=True)
def gateway(real_cluster: Settings, outside: Asker) -> Iterator[None]:
    """Define the Gateway API's objects, run controller, applications and routes, and remove all of it."""
    definitions = contents.gateway_definitions()
    cluster.kubectl("apply", "--server-side", "-f", definitions)
    words = ["wait", "--for=condition=Established", "crd/httproutes.gateway.networking.k8s.io"]
    cluster.kubectl(*words, "--timeout=30s")
    files = ("controller", "applications")
    objects = [each for file in files for each in kube.example(f"gateway/{file}.yaml", SHOP)]
    routes = kube.example("gateway/gateway.yaml", SHOP)
    try:
        with kube.running((CONTROLLER, SHOP), *objects):
            kube.apply(*routes)
            questions = [
                question
                for address, port in doors()
                for question in (
                    Question(address, port, host=HOST),
                    Question(address, port, "/orders/hostname", host=HOST),
                )
            ]
            canary = [Question(*door, host=HOST, headers=CANARY) for door in doors()]

            def look() -> bool:
                served = all(each.body for each in outside.ask(questions))
                return served and {each.body for each in outside.ask(canary)} == pods("canary")

            wait_for("the controller to serve the routes", look, limit=60, every=0.5)
            yield
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "-f", definitions, limit=120)


def doors() -> list[tuple[str, int]]:
    """Return every address and port where the outside finds the controller."""
    service = kube.get("service", "controller", f"--namespace={CONTROLLER}")[0]
    (port,) = service["spec"]["ports"]
    balanced = kube.balanced_addresses(CONTROLLER, "controller")
    nodes = [str(each) for node in kube.nodes() for each in node.addresses if each.version == 4]
    return [*[(each, port["port"]) for each in balanced], *[(each, port["nodePort"]) for each in nodes]]


def pods(name: str) -> set[str]:
    """Return the Pods of an application."""
    return {pod.name for pod in kube.pods(SHOP, app=name)}


def test_a_path_prefix_has_its_own_application(outside: Asker) -> None:
    for address, port in doors():
        answers = outside.ask([Question(address, port, "/orders/hostname", host=HOST)] * 5)
        assert {each.body for each in answers} == pods("orders"), address


def test_a_header_chooses_the_canary(outside: Asker) -> None:
    for address, port in doors():
        question = Question(address, port, host=HOST, headers=CANARY)
        assert {each.body for each in outside.ask([question] * 20)} == pods("canary"), address


def test_an_unknown_host_is_not_found(outside: Asker) -> None:
    for address, port in doors():
        assert outside.one(Question(address, port, host="other.example.com")).error == "status 404"


def test_weights_split_the_requests(outside: Asker) -> None:
    address, port = doors()[0]
    found = Counter(each.body for each in outside.ask([Question(address, port, host=HOST)] * REQUESTS))
    stable, canary = pods("stable"), pods("canary")
    assert set(found) == stable | canary
    # the controller deals in turns, so that the split is nearly exact
    assert sum(found[each] for each in canary) == pytest.approx(REQUESTS / 10, rel=0.2)
