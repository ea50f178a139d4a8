"""The cluster as its tests see it: objects as JSON, commands in Pods, conditions that are awaited."""

import json
import shlex
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import yaml

from tests.cluster import cluster
from tests.cluster.console import ClusterError, wait_for

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Place:
    """A Pod or a node that can be connected to, with its addresses in both families."""

    name: str
    node: str
    addresses: tuple[Address, ...]


def apply(*objects: dict[str, Any]) -> None:
    """Apply objects."""
    cluster.kubectl("apply", "-f", "-", stdin="---\n".join(map(json.dumps, objects)).encode())


def documents(path: str) -> list[dict[str, Any]]:
    """Return the objects of a manifest in conf/."""
    return [each for each in yaml.safe_load_all((cluster.CONF / path).read_text()) if each]


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
