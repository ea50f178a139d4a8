"""Names of Services through CoreDNS, which is itself a Service that podwall serves at 10.96.0.10."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.cluster import kube
from tests.cluster.cluster import Settings
from tests.cluster.console import ClusterError, wait_for

NAMESPACE = "names"
FILES = ("headless", "external-name", "ports", "client")


@pytest.fixture(scope="module", autouse=True)
def services(real_cluster: Settings) -> Iterator[None]:
    """Run the examples that have names to ask for."""
    objects = [each for file in FILES for each in kube.example(f"services/{file}.yaml", NAMESPACE)]
    with kube.running((NAMESPACE,), *objects):
        wait_for("the DNS to name both Pods", lambda: len(dig("postgres", "A")) == 2, limit=40, every=1)
        wait_for("a Service to answer the client", answers, limit=20)
        yield


def answers() -> bool:
    """Say whether the client's node has the Service."""
    with contextlib.suppress(ClusterError):  # curl says so when nobody answers
        return bool(kube.execute(NAMESPACE, "client", "curl", "-s", "-m", "5", "http://two-ports/hostname"))
    return False


def dig(name: str, kind: str, *more: str) -> set[str]:
    """Ask the cluster's DNS from a Pod, with its search path, and return the lines of the answer."""
    words = ["dig", "+search", "+short", "+time=2", "+tries=2", *more, name, kind]
    return set(kube.execute(NAMESPACE, "client", *words).split("\n")) - {""}


@pytest.mark.parametrize(
    "name", ["two-ports", f"two-ports.{NAMESPACE}", f"two-ports.{NAMESPACE}.svc.cluster.local"]
)
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_a_service_is_found_by_its_names(name: str, transport: str) -> None:
    four, six = kube.addresses(NAMESPACE, "two-ports")
    assert dig(name, "A", transport) == {four}
    assert dig(name, "AAAA", transport) == {six}


def test_named_ports_have_srv_records() -> None:
    full = f"two-ports.{NAMESPACE}.svc.cluster.local."
    for port, number in (("http", 80), ("metrics", 9090)):
        (record,) = dig(f"_{port}._tcp.two-ports.{NAMESPACE}.svc.cluster.local", "SRV")
        assert record.split()[2:] == [str(number), full]


def test_an_external_name_is_a_cname() -> None:
    name = f"database.{NAMESPACE}.svc.cluster.local"
    said = kube.execute(NAMESPACE, "client", "dig", "+noall", "+answer", "+time=2", name, "CNAME")
    assert said.split()[3:] == ["CNAME", "database.example.com."]


def test_a_headless_service_names_its_pods() -> None:
    pods = kube.pods(NAMESPACE, app="postgres")
    assert len(pods) == 2
    for version, kind in ((4, "A"), (6, "AAAA")):
        own = {pod.name: str(each) for pod in pods for each in pod.addresses if each.version == version}
        wait_for("all Pods' addresses", lambda k=kind: len(dig("postgres", k)) == 2, limit=40, every=1)  # type: ignore[misc]
        assert dig("postgres", kind) == set(own.values())
        for name, address in own.items():
            assert dig(f"{name}.postgres", kind) == {address}


def test_pods_answer_by_their_names() -> None:
    for name in ("postgres-0", "postgres-1"):
        url = f"http://{name}.postgres:5432/hostname"
        assert kube.execute(NAMESPACE, "client", "curl", "-s", "-m", "5", url) == name
    assert kube.execute(NAMESPACE, "client", "curl", "-s", "-m", "5", "http://two-ports/hostname")


def test_names_in_the_cluster_are_found_by_every_pod_as_well() -> None:
    (address,) = dig("kubernetes.default", "A")
    assert kube.addresses("default", "kubernetes")[0] == address
