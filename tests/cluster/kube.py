"""The cluster as its tests see it: objects as JSON, commands in Pods, conditions that are awaited."""

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import yaml

from tests.cluster import cluster, contents
from tests.cluster.console import ClusterError, wait_for

Address = IPv4Address | IPv6Address
CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "GatewayClass", "IngressClass", "Namespace"}


@dataclass(frozen=True, slots=True)
class Place:
    """A Pod or a node that can be connected to, with its addresses in both families."""

    name: str
    node: str
    addresses: tuple[Address, ...]


def apply(*objects: dict[str, Any]) -> None:
    """Apply objects."""
    cluster.kubectl("apply", "-f", "-", stdin=listed(objects))


def listed(objects: Sequence[dict[str, Any]]) -> bytes:
    """Return objects as one List: a stream of JSON documents would lose some between its separators."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}).encode()


def documents(path: str) -> list[dict[str, Any]]:
    """Return the objects of a manifest in conf/."""
    return [each for each in yaml.safe_load_all((cluster.CONF / path).read_text()) if each]


def example(path: str, namespace: str) -> list[dict[str, Any]]:
    """Return the objects of a file in examples/, those without a namespace in this one."""
    text = (cluster.image.PROJECT / "examples" / path).read_text()
    objects = [each for each in yaml.safe_load_all(text) if each]
    for each in objects:
        if each["kind"] not in CLUSTER_WIDE:
            each["metadata"].setdefault("namespace", namespace)
    return objects


def client_daemon(namespace: str) -> dict[str, Any]:
    """Return a DaemonSet that puts a Pod to ask from on every node."""
    labels = {"app": "asker"}
    pod = {"containers": [{"name": "asker", "image": contents.agnhost_name(), "args": ["pause"]}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "asker", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {**pod, "tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 1},
            },
        },
    }


@contextlib.contextmanager
def running(namespaces: Sequence[str], *objects: dict[str, Any]) -> Iterator[None]:
    """Apply objects in namespaces made for them, wait until all Pods are ready, and remove all afterwards."""
    try:
        apply(
            *[{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": each}} for each in namespaces],
            *[each for each in objects if each["kind"] != "Namespace"],
        )
        for namespace in namespaces:
            await_all_ready(namespace)
        yield
    finally:
        spread = [each for each in objects if each["kind"] in CLUSTER_WIDE and each["kind"] != "Namespace"]
        if spread:
            delete(*spread)
        cluster.kubectl("delete", "namespace", *namespaces, "--ignore-not-found", limit=180)


def delete(*objects: dict[str, Any]) -> None:
    """Delete objects that may be gone already."""
    cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=listed(objects), limit=120)


def await_all_ready(namespace: str, limit: float = 120) -> None:
    """Wait until every workload of a namespace has all its Pods Ready."""

    def look() -> bool:
        return all(map(is_complete, get("deployments,daemonsets,statefulsets,pods", "-n", namespace)))

    try:
        wait_for(f"the Pods of {namespace}", look, limit=limit, every=0.5)
    except ClusterError as error:
        described = cluster.kubectl("--namespace", namespace, "describe", "pods")
        raise ClusterError(f"{error}\n{described[-6000:]}") from error


def is_complete(thing: dict[str, Any]) -> bool:
    """Say whether a workload has all its Pods, updated and Ready, or a Pod is Ready or on its way out."""
    status = thing["status"]
    if thing["kind"] == "Pod":
        return condition(thing, "Ready") or "deletionTimestamp" in thing["metadata"]
    if status.get("observedGeneration", 0) < thing["metadata"]["generation"]:
        return False
    if thing["kind"] == "DaemonSet":
        wanted = status["desiredNumberScheduled"]
        return 0 < wanted == status.get("numberReady", 0) == status.get("updatedNumberScheduled", 0)
    wanted = thing["spec"]["replicas"]
    return bool(wanted == status.get("readyReplicas", 0) == status.get("updatedReplicas", wanted))


def get(*words: str) -> list[dict[str, Any]]:
    """Return the listed objects."""
    found = json.loads(cluster.kubectl("get", *words, "--output=json"))
    return list(found["items"]) if "items" in found else [found]


def pods(namespace: str, **labels: str) -> list[Place]:
    """Return the running Pods with these labels that are Ready and have an address of each family."""
    selector = ",".join(f"{name}={value}" for name, value in labels.items())
    found = []
    for pod in get("pods", f"--namespace={namespace}", f"--selector={selector}"):
        addresses = tuple(ip_address(each["ip"]) for each in pod["status"].get("podIPs", []))
        if condition(pod, "Ready") and "deletionTimestamp" not in pod["metadata"]:
            found.append(Place(pod["metadata"]["name"], pod["spec"]["nodeName"], addresses))
    return sorted(found, key=lambda place: place.name)


def nodes() -> list[Place]:
    """Return the nodes with their internal addresses."""
    found = []
    for node in get("nodes"):
        listed = [each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP"]
        name = node["metadata"]["name"]
        found.append(Place(name, name, tuple(map(ip_address, listed))))
    return found


def condition(thing: dict[str, Any], kind: str) -> bool:
    """Say whether an object's condition is true."""
    listed = thing["status"].get("conditions", [])
    return any(each["type"] == kind and each["status"] == "True" for each in listed)


def wait_for_pods(namespace: str, count: int, limit: float = 60, **labels: str) -> list[Place]:
    """Wait until exactly so many Pods are Ready, and return them."""
    what = f"{count} Pods {labels} in {namespace}"

    def look() -> list[Place]:
        found = pods(namespace, **labels)
        return found if len(found) == count else []

    try:
        return wait_for(what, look, limit=limit, every=0.5)
    except ClusterError as error:
        described = cluster.kubectl("--namespace", namespace, "describe", "pods")
        raise ClusterError(f"{error}\n{described[-6000:]}") from error


def addresses(namespace: str, service: str) -> list[str]:
    """Return a Service's ClusterIPs."""
    return list(get("service", service, f"--namespace={namespace}")[0]["spec"]["clusterIPs"])


def balanced_addresses(namespace: str, service: str, limit: float = 30) -> list[str]:
    """Wait until a Service has a LoadBalancer address of each of its families, and return them."""

    def look() -> list[str]:
        found = get("service", service, f"--namespace={namespace}")[0]
        given = [each["ip"] for each in found["status"]["loadBalancer"].get("ingress", [])]
        return given if len(given) == len(found["spec"]["ipFamilies"]) else []

    return wait_for(f"addresses of {namespace}/{service}", look, limit=limit)


def execute(namespace: str, pod: str, *words: str, limit: float = 60) -> str:
    """Run a command in a Pod and return what it prints."""
    return cluster.kubectl("--namespace", namespace, "exec", pod, "--", *words, limit=limit)


def fetch_all(urls: list[str], seconds: int = 5) -> list[str]:
    """Return a command that fetches each URL and prints it with its answer; a failure is curl's number."""
    listed = " ".join(map(shlex.quote, urls))
    fetch = f'answer=$(curl -g -s -m {seconds} "$url") || answer="curl:$?"'
    return ["sh", "-c", f'for url in {listed}; do {fetch}; echo "$url $answer"; done']


def answers(printed: str) -> dict[str, str]:
    """Return what `fetch_all` printed, by URL."""
    return dict(line.split(" ", 1) for line in printed.splitlines())


def url(address: Address, port: int, path: str) -> str:
    """Return the URL of a path on an address of either family."""
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{port}/{path}"


def client(answer: str) -> Address:
    """Return the client's address from what agnhost's /clientip answers, ADDRESS:PORT."""
    return ip_address(answer.rsplit(":", 1)[0].strip("[]"))
