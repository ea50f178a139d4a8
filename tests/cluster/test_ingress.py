"""An ingress controller on podwall's network: from outside, by a LoadBalancer address and by a NodePort of
every node, to Pods that a NetworkPolicy opens to the controller alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cluster, kube, places
from tests.cluster.ask import Question
from tests.cluster.cluster import Settings
from tests.cluster.console import run, wait_for
from tests.cluster.places import Asker

CONTROLLER, WEB = "ingress-nginx", "web"
HOST = "api.example.com"
REDIRECTED = ("status 301", "status 302", "status 307", "status 308")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate for the API's name, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "certificate.pem"
    names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    run([*words, "-keyout", key, "-out", chain])
    return key, chain


@pytest.fixture(scope="module", autouse=True)
def ingress(real_cluster: Settings, certificate: tuple[Path, Path], outside: Asker) -> Iterator[None]:
    """Run controller and applications, and wait until the controller has read the Ingresses."""
    key, chain = certificate
    files = ("controller", "applications")
    objects = [each for file in files for each in kube.example(f"ingress/{file}.yaml", WEB)]
    with kube.running((CONTROLLER, WEB), *objects):
        words = ["create", "secret", "tls", "api-example-com", f"--key={key}", f"--cert={chain}"]
        cluster.kubectl("-n", WEB, *words)
        kube.apply(*kube.example("ingress/ingress.yaml", WEB))
        everywhere = [Question(address, port, host="www.example.com") for address, port in doors("http")]
        redirected = [Question(address, port, "/v1", host=HOST) for address, port in doors("http")]

        def look() -> bool:
            served = all(each.body for each in outside.ask(everywhere))
            return served and all(each.error in REDIRECTED for each in outside.ask(redirected))

        wait_for("the controller to serve the Ingresses", look, limit=60, every=0.5)
        yield


def doors(name: str) -> list[tuple[str, int]]:
    """Return every address and port where the outside finds the controller's port."""
    service = kube.get("service", "controller", f"--namespace={CONTROLLER}")[0]
    (port,) = [each for each in service["spec"]["ports"] if each["name"] == name]
    balanced = kube.balanced_addresses(CONTROLLER, "controller")
    nodes = [str(each) for node in kube.nodes() for each in node.addresses]
    return [*[(each, port["port"]) for each in balanced], *[(each, port["nodePort"]) for each in nodes]]


def applications(name: str) -> set[str]:
    """Return the Pods of an application."""
    return {pod.name for pod in kube.pods(WEB, app=name)}


def fetch(door: tuple[str, int], path: str, chain: Path, *more: str) -> str:
    """Get a path of the API over TLS from outside, by one door, and return body and status."""
    address, port = door
    host = f"[{address}]" if ":" in address else address
    words = ["curl", "-s", "-m", "10", "--cacert", "/dev/stdin", "-w", " %{http_code}", *more]
    words += ["--resolve", f"{HOST}:{port}:{host}", f"https://{HOST}:{port}{path}"]
    on_outside = ["exec", "--interactive", cluster.OUTSIDE]
    return cluster.docker(*on_outside, *words, stdin=chain)


@pytest.mark.parametrize(
    ("path", "application"),
    [("/v1", "api-v1"), ("/v1/deeper", "api-v1"), ("/v2", "api-v2"), ("/v2/deeper", None), ("/v10", None)],
)
def test_paths_by_prefix_and_exactly_over_tls(
    path: str, application: str | None, certificate: tuple[Path, Path]
) -> None:
    """Whatever the path, the application is asked for /hostname: that is the rewriting."""
    for door in doors("https"):
        body, status = fetch(door, path, certificate[1]).rsplit(" ", 1)
        if application:
            assert (body in applications(application), status) == (True, "200"), (door, body)
        else:
            assert status == "404", (door, body)


def test_both_pods_of_an_application_are_used(certificate: tuple[Path, Path]) -> None:
    door = doors("https")[0]
    seen = {fetch(door, "/v1", certificate[1]).split()[0] for _ in range(12)}
    assert seen == applications("api-v1")


def test_plain_http_is_redirected_where_the_annotation_says_so(outside: Asker) -> None:
    for address, port in doors("http"):
        answer = outside.one(Question(address, port, "/v1", host=HOST))
        assert answer.error in REDIRECTED, (address, answer)


def test_another_host_is_served_over_plain_http(outside: Asker) -> None:
    for address, port in doors("http"):
        answers = outside.ask([Question(address, port, host="www.example.com")] * 5)
        assert {each.body for each in answers} == applications("www"), address
        assert outside.one(Question(address, port, host="unknown.example.com")).error == "status 404"


def test_only_the_controller_reaches_the_applications(nodes: dict[str, Asker], outside: Asker) -> None:
    """A Pod of another namespace hears nothing, through the Service or straight."""
    namespace = "stranger"
    with kube.running((namespace,), kube.client_daemon(namespace)):
        for pod in kube.pods(namespace, app="asker"):
            straight = [str(each) for place in kube.pods(WEB, app="www") for each in place.addresses]
            questions = [Question(kube.addresses(WEB, "www")[0], 80, limit=1)]
            questions += [Question(each, 8080, limit=1) for each in straight]
            answers = places.pod(namespace, pod.name).ask(questions)
            assert {each.error for each in answers} == {"timeout"}, pod


def test_the_ingress_has_the_services_address() -> None:
    wanted = set(kube.balanced_addresses(CONTROLLER, "controller"))

    def look() -> bool:
        status = kube.get("ingress", "api", f"--namespace={WEB}")[0]["status"]
        return {each.get("ip") for each in status["loadBalancer"].get("ingress", [])} == wanted

    wait_for("the Ingress's address", look, limit=30)
