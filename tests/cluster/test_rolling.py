"""Rolling update and scaling under load: no failed request, and traffic that follows the EndpointSlices."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster import cluster, kube, places
from tests.cluster.ask import Answer, Question
from tests.cluster.cluster import Settings
from tests.cluster.console import ENDS_WITH_US, say, wait_for
from tests.cluster.gobuild import programs
from tests.cluster.places import Asker
from tests.cluster.versions import KUBERNETES_MODULE

NAMESPACE = "rolling"
SERVICE = "rolling"
NODE_PORT = 30090
REPLICAS = 10
RATE = 50
FOLLOWS_S = 0.2
"""How soon after the EndpointSlice's event the rules hold."""


@pytest.fixture(scope="module", autouse=True)
def rolling(real_cluster: Settings) -> Iterator[None]:
    """Run the example and a Pod to ask from on every node."""
    objects = kube.example("services/rolling-update.yaml", NAMESPACE)
    with kube.running((NAMESPACE,), *objects, kube.client_daemon(NAMESPACE)):
        yield


@pytest.fixture(scope="module")
def asker(rolling: None) -> Asker:
    """Return a Pod to ask from."""
    return places.pod(NAMESPACE, kube.pods(NAMESPACE, app="asker")[0].name)


class SliceWatch:
    """What the API server says of the Service's EndpointSlices, and when: who was ready since when."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._slices: dict[str, frozenset[str]] = {}
        self.changes: list[tuple[float, frozenset[str]]] = []
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            event, now = json.loads(line), time.time()
            name = event["object"]["metadata"]["name"]
            gone = event["type"] == "DELETED"
            self._slices[name] = frozenset() if gone else ready(event["object"])
            self.changes.append((now, frozenset().union(*self._slices.values())))

    def ready_since(self, name: str) -> float:
        """Return when a Pod became ready."""
        return next(at for at, names in self.changes if name in names)

    def removed_at(self, name: str) -> float | None:
        """Return when a Pod was no longer ready, if it is not."""
        last: float | None = None
        for at, names in reversed(self.changes):
            if name in names:
                return last
            last = at
        return last


def ready(endpoint_slice: dict[str, Any]) -> frozenset[str]:
    """Return the names of an EndpointSlice's ready Pods."""
    listed = endpoint_slice.get("endpoints") or []
    return frozenset(each["targetRef"]["name"] for each in listed if each["conditions"]["ready"])


@pytest.fixture
def watch() -> Iterator[SliceWatch]:
    """Watch the IPv4 EndpointSlices as the agents do."""
    path = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
    chosen = f"watch=true&labelSelector=kubernetes.io/service-name={SERVICE}"
    words = [str(programs(KUBERNETES_MODULE) / "kubectl"), "get", "--raw", f"{path}?{chosen}"]
    environment = cluster.environment()
    with subprocess.Popen(
        [*ENDS_WITH_US, *words], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        found = SliceWatch(process)
        wait_for("the first EndpointSlice", lambda: found.changes, limit=20)
        try:
            yield found
        finally:
            process.kill()


def scale(replicas: int) -> None:
    """Ask for another number of Pods."""
    cluster.kubectl("-n", NAMESPACE, "scale", f"deployment/{SERVICE}", f"--replicas={replicas}")


def failures(found: list[tuple[Question, Answer]]) -> list[str]:
    """Return what was not answered."""
    return [f"{asked.address}:{asked.port} {answer}" for asked, answer in found if not answer.body]


def test_a_rolling_update_fails_no_request(asker: Asker, outside: Asker) -> None:
    """Ten Pods are replaced under 50 requests per second each by ClusterIP and by every node's port."""
    before = {pod.name for pod in kube.pods(NAMESPACE, app=SERVICE)}
    assert len(before) == REPLICAS
    inside = [Question(each, 80) for each in kube.addresses(NAMESPACE, SERVICE)]
    at_nodes = [Question(str(each), NODE_PORT) for node in kube.nodes() for each in node.addresses]
    with places.asking(asker, inside, RATE) as first, places.asking(outside, at_nodes, RATE) as second:
        cluster.kubectl("-n", NAMESPACE, "rollout", "restart", f"deployment/{SERVICE}")
        words = ["rollout", "status", f"deployment/{SERVICE}", "--timeout=180s"]
        cluster.kubectl("-n", NAMESPACE, *words, limit=190)
        after = {pod.name for pod in kube.wait_for_pods(NAMESPACE, REPLICAS, app=SERVICE)}
        streams = [first.end(), second.end()]
    for found in streams:
        say(f"rolling update: {len(found)} requests, {len(failures(found))} failed")
        assert not failures(found)
        assert {answer.body for _, answer in found} >= before | after
    assert not before & after


def test_traffic_follows_the_first_and_the_last_endpoint(nodes: dict[str, Asker], watch: SliceWatch) -> None:
    """From none to one Pod and back: each node answers, then refuses, soon after the event."""
    scale(0)
    wait_for("no endpoints", lambda: not watch.changes[-1][1], limit=60)
    address = kube.addresses(NAMESPACE, SERVICE)[0]
    for name, asker in nodes.items():
        with places.asking(asker, [Question(address, 80, limit=1)], RATE) as stream:
            scale(1)
            (pod,) = wait_for("an endpoint", lambda: watch.changes[-1][1], limit=60)
            wait_for("an answer", lambda s=stream: s.so_far()[-1][1].body, limit=5)  # type: ignore[misc]
            scale(0)
            wait_for("no endpoint", lambda: not watch.changes[-1][1], limit=60)
            wait_for("a refusal", lambda s=stream: s.so_far()[-1][1].error, limit=10)  # type: ignore[misc]
            found = [answer for _, answer in stream.end()]
        began = min(each.at for each in found if each.body) - watch.ready_since(pod)
        removed = watch.removed_at(pod)
        assert removed
        ended = max(each.at for each in found if each.body) - removed
        say(
            f"{name}: answers {began * 1000:.0f} ms after the first endpoint came, "
            f"none {ended * 1000:.0f} ms after it went"
        )
        assert began < FOLLOWS_S + 1 / RATE
        assert ended < FOLLOWS_S
        assert {each.error for each in found} <= {"", "refused"}


def test_traffic_follows_scaling(asker: Asker, watch: SliceWatch) -> None:
    """From three to ten to one: every new Pod is used, no removed one is, and no request fails."""
    scale(3)
    kube.wait_for_pods(NAMESPACE, 3, app=SERVICE)
    address = kube.addresses(NAMESPACE, SERVICE)[0]
    with places.asking(asker, [Question(address, 80)], RATE) as stream:
        scale(REPLICAS)
        up = wait_for_ready(watch, REPLICAS)
        wait_for("every Pod's answer", lambda: {each.body for _, each in stream.so_far()} >= up, limit=10)
        scale(1)
        (last,) = wait_for_ready(watch, 1)
        at = time.time()
        wait_for("later answers", lambda: stream.so_far()[-1][1].at > at + 1, limit=10)
        found = stream.end()
    assert not failures(found)
    for name in up - {last}:
        removed = watch.removed_at(name)
        assert removed
        late = max(answer.at for _, answer in found if answer.body == name) - removed
        assert late < FOLLOWS_S, name


def wait_for_ready(watch: SliceWatch, count: int) -> frozenset[str]:
    """Wait until so many Pods are ready by the EndpointSlices, and return them."""
    look: Callable[[], frozenset[str]] = lambda: (  # noqa: E731
        watch.changes[-1][1] if len(watch.changes[-1][1]) == count else frozenset()
    )
    return wait_for(f"{count} ready endpoints", look, limit=90)
