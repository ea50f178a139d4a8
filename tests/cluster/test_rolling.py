"""Rolling update and scaling under load: no failed request, and traffic that follows the EndpointSlices."""

import contextlib
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
from tests.cluster.contents import agnhost_name
from tests.cluster.gobuild import programs
from tests.cluster.places import Asker
from tests.cluster.versions import KUBERNETES_MODULE

NAMESPACE = "rolling"
SERVICE = "rolling"
NODE_PORT = 30090
REPLICAS = 10
RATE = 50
CHOOSY = "choosy"
FLAG = "/ready"
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
    """What the API server says of the Service's EndpointSlices, and when: which Pods are to be used.

    These are the ready ones; where there is none, those that end and serve still.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._slices: dict[str, list[dict[str, Any]]] = {}
        self.changes: list[tuple[float, frozenset[str]]] = []
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            event, now = json.loads(line), time.time()
            gone = event["type"] == "DELETED"
            listed = [] if gone else event["object"].get("endpoints") or []
            self._slices[event["object"]["metadata"]["name"]] = listed
            every = [each for endpoints in self._slices.values() for each in endpoints]
            self.changes.append((now, with_condition(every, "ready") or with_condition(every, "serving")))

    def used_since(self, name: str) -> float:
        """Return when a Pod came to be used."""
        return next(at for at, names in self.changes if name in names)

    def unused_since(self, name: str) -> float:
        """Return when a Pod that was used came to be used no longer."""
        last_used = max(index for index, (_, names) in enumerate(self.changes) if name in names)
        return self.changes[last_used + 1][0]


def with_condition(endpoints: list[dict[str, Any]], condition: str) -> frozenset[str]:
    """Return the names of the Pods whose condition is true."""
    return frozenset(each["targetRef"]["name"] for each in endpoints if each["conditions"].get(condition))


@contextlib.contextmanager
def watching(service: str) -> Iterator[SliceWatch]:
    """Watch a Service's IPv4 EndpointSlices as the agents do."""
    path = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
    chosen = f"watch=true&labelSelector=kubernetes.io/service-name={service}"
    words = [str(programs(KUBERNETES_MODULE) / "kubectl"), "get", "--raw", f"{path}?{chosen}"]
    environment = cluster.environment()
    with subprocess.Popen(
        [*ENDS_WITH_US, *words], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        found = SliceWatch(process)
        try:
            wait_for("the first EndpointSlice", lambda: found.changes, limit=20)
            yield found
        finally:
            process.kill()


@pytest.fixture
def watch() -> Iterator[SliceWatch]:
    """Watch the Service that is scaled."""
    with watching(SERVICE) as found:
        yield found


def scale(replicas: int) -> None:
    """Ask for another number of Pods."""
    cluster.kubectl("-n", NAMESPACE, "scale", f"deployment/{SERVICE}", f"--replicas={replicas}")


def answered(found: list[tuple[Question, Answer]]) -> set[str]:
    """Return who answered."""
    return {answer.body for _, answer in found}


def failures(found: list[tuple[Question, Answer]]) -> list[str]:
    """Return what was not answered."""
    return [f"{asked.address}:{asked.port} {answer}" for asked, answer in found if not answer.body]


def test_a_rolling_update_fails_no_request(asker: Asker, outside: Asker) -> None:
    """Ten Pods are replaced under 50 requests per second each by ClusterIP and by every node's port."""
    before = {pod.name for pod in kube.pods(NAMESPACE, app=SERVICE)}
    assert len(before) == REPLICAS
    inside = [Question(each, 80) for each in kube.addresses(NAMESPACE, SERVICE)]
    at_nodes = [Question(str(each), NODE_PORT) for node in kube.nodes() for each in node.addresses]
    for each, questions in ((asker, inside), (outside, at_nodes)):
        wait_for(
            f"the Service to answer {each.name}",
            lambda a=each, q=questions: all(answer.body for answer in a.ask(q)),  # type: ignore[misc]
            limit=20,
        )
    with places.asking(asker, inside, RATE) as first, places.asking(outside, at_nodes, RATE) as second:
        cluster.kubectl("-n", NAMESPACE, "rollout", "restart", f"deployment/{SERVICE}")
        words = ["rollout", "status", f"deployment/{SERVICE}", "--timeout=180s"]
        cluster.kubectl("-n", NAMESPACE, *words, limit=190)
        after = {pod.name for pod in kube.wait_for_pods(NAMESPACE, REPLICAS, app=SERVICE)}
        for each in (first, second):
            wait_for("every new Pod's answer", lambda s=each: answered(s.so_far()) >= after, limit=20)  # type: ignore[misc]
        streams = [first.end(), second.end()]
    for found in streams:
        say(f"rolling update: {len(found)} requests, {len(failures(found))} failed")
        assert not failures(found)
    assert not before & after


@pytest.mark.parametrize("number", range(cluster.TESTED_NODES))
def test_traffic_follows_the_first_and_the_last_endpoint(
    number: int, nodes: dict[str, Asker], watch: SliceWatch
) -> None:
    """From none to one Pod and back: each node answers, then refuses, soon after the event."""
    node, asker = sorted(nodes.items())[number]
    address = kube.addresses(NAMESPACE, SERVICE)[0]
    scale(0)
    wait_for("no endpoint", lambda: not watch.changes[-1][1], limit=60)
    with places.asking(asker, [Question(address, 80, limit=1)], RATE) as stream:
        stream.await_last("a refusal", lambda answer: answer.error == "refused")
        scale(1)
        (pod,) = wait_for("an endpoint", lambda: watch.changes[-1][1], limit=60)
        stream.await_last("an answer", lambda answer: answer.body == pod)
        scale(0)
        wait_for("no endpoint", lambda: not watch.changes[-1][1], limit=60)
        stream.await_last("a refusal", lambda answer: answer.error == "refused")
        answers = at_of(stream.end(), pod)
    began, ended = min(answers) - watch.used_since(pod), max(answers) - watch.unused_since(pod)
    say(f"{node}: first answer {began * 1000:.0f} ms after it came, last {ended * 1000:.0f} ms after it went")
    assert began < FOLLOWS_S + 1 / RATE
    assert ended < FOLLOWS_S


def test_traffic_follows_scaling(asker: Asker, watch: SliceWatch) -> None:
    """From three to ten to one: every new Pod is used, no removed one is, and no request fails."""
    scale(3)
    kube.wait_for_pods(NAMESPACE, 3, app=SERVICE)
    address = kube.addresses(NAMESPACE, SERVICE)[0]
    wait_for("the Service", lambda: asker.one(Question(address, 80)).body, limit=20)
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
    late = {name: max(at_of(found, name)) - watch.unused_since(name) for name in up - {last}}
    say(f"scaled down: last answer of a removed Pod {max(late.values()) * 1000:.0f} ms after its event")
    assert max(late.values()) < FOLLOWS_S


def choosy() -> list[dict[str, Any]]:
    """Return three Pods that are ready as long as they have a file, and their Service."""
    labels = {"app": CHOOSY}
    container = {
        "name": CHOOSY,
        "image": agnhost_name(),
        "command": ["sh", "-c", f"touch {FLAG}; exec /agnhost netexec --http-port=8080 --udp-port=-1"],
        "readinessProbe": {
            "exec": {"command": ["test", "-e", FLAG]},
            "periodSeconds": 1,
            "failureThreshold": 1,
        },
    }
    metadata = {"name": CHOOSY, "namespace": NAMESPACE}
    template = {
        "metadata": {"labels": labels},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {"replicas": 3, "selector": {"matchLabels": labels}, "template": template},
        },
    ]


def test_traffic_leaves_a_pod_that_is_not_ready_and_comes_back(asker: Asker) -> None:
    kube.apply(*choosy())
    kube.await_all_ready(NAMESPACE)
    everybody = {pod.name for pod in kube.pods(NAMESPACE, app=CHOOSY)}
    moody = min(everybody)
    address = kube.addresses(NAMESPACE, CHOOSY)[0]
    wait_for(
        "the Service to lead to all of them",
        lambda: {each.body for each in asker.ask([Question(address, 80)] * 40)} == everybody,
        limit=20,
    )
    with watching(CHOOSY) as watch, places.asking(asker, [Question(address, 80)], RATE) as stream:
        kube.execute(NAMESPACE, moody, "rm", FLAG)
        wait_for("its end as an endpoint", lambda: moody not in watch.changes[-1][1], limit=20)
        left, before = watch.unused_since(moody), len(stream.so_far())
        wait_for("more answers", lambda: len(stream.so_far()) > before + RATE, limit=10)
        kube.execute(NAMESPACE, moody, "touch", FLAG)
        wait_for("its return", lambda: moody in watch.changes[-1][1], limit=20)
        stream.await_last("its answer", lambda answer: answer.body == moody)
        found = stream.end()
    assert not failures(found)
    back = next(at for at, names in watch.changes if at > left and moody in names)
    assert not [at for at in at_of(found, moody) if left + FOLLOWS_S < at < back - FOLLOWS_S]


def at_of(found: list[tuple[Question, Answer]], name: str) -> list[float]:
    """Return when those were asked whom a Pod answered."""
    return [answer.at for _, answer in found if answer.body == name]


def wait_for_ready(watch: SliceWatch, count: int) -> frozenset[str]:
    """Wait until so many Pods are ready by the EndpointSlices, and return them."""
    look: Callable[[], frozenset[str]] = lambda: (  # noqa: E731
        watch.changes[-1][1] if len(watch.changes[-1][1]) == count else frozenset()
    )
    return wait_for(f"{count} ready endpoints", look, limit=90)
