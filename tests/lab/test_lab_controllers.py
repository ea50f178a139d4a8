"""What the controllers make of manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.controllers import LabNode, container_ports, expand, must_restart
from lab.manifests import parse
from lab.objects import Key, ManifestError, Object

NODES = tuple(LabNode(f"node{n}", {"kubernetes.io/hostname": f"node{n}"}) for n in (1, 2, 3))
TEMPLATE = """
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, ports: [{name: http, containerPort: 8080}]}]}
"""
CONTAINERS = "containers: [{name: c, ports: [{containerPort: 80}]}]"


def workload(kind: str, extra: str = "", name: str = "web") -> str:
    return f"apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:{TEMPLATE}{extra}"


def pod(name: str, spec: str = CONTAINERS, metadata: str = "") -> str:
    return f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}{metadata}}}\nspec: {{{spec}}}"


def expanded(
    *texts: str, nodes: Sequence[LabNode] = NODES, before: Mapping[Key, Object] | None = None
) -> Any:
    return expand(parse("\n---\n".join(texts), "test"), nodes, before or {})


def pods_of(*texts: str, **arguments: Any) -> list[Object]:
    return list(expanded(*texts, **arguments).of("Pod").values())


def nodes_of(pods: Sequence[Object]) -> list[str]:
    return [pod["spec"].get("nodeName", "") for pod in pods]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (workload("Deployment"), 1),
        (workload("Deployment", "  replicas: 3"), 3),
        (workload("Deployment", "  replicas: 0"), 0),
        (workload("ReplicaSet", "  replicas: 2"), 2),
        (workload("StatefulSet", "  replicas: 2"), 2),
        (workload("DaemonSet"), 3),
        (workload("Job", "  parallelism: 2\n  completions: 3").replace("apps/", "batch/"), 2),
        (pod("single"), 1),
    ],
)
def test_a_workload_has_its_pods_with_its_labels(text: str, count: int) -> None:
    pods = pods_of(text)

    assert len(pods) == count
    assert all(pod["metadata"].get("labels", {}).get("app") in {"web", None} for pod in pods)
    assert len({pod["metadata"]["name"] for pod in pods}) == count


def test_names_are_those_of_kubernetes() -> None:
    stateful = pods_of(workload("StatefulSet", "  replicas: 2", name="db"))
    assert [pod["metadata"]["name"] for pod in stateful] == ["db-0", "db-1"]
    assert stateful[0]["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"] == "db-0"

    [deployed] = pods_of(workload("Deployment"))
    revision = deployed["metadata"]["labels"]["pod-template-hash"]
    assert deployed["metadata"]["name"].startswith(f"web-{revision}-")


def test_a_changed_template_names_new_pods_and_scaling_keeps_them() -> None:
    three = pods_of(workload("Deployment", "  replicas: 3"))
    two = pods_of(workload("Deployment", "  replicas: 2"))
    changed = pods_of(workload("Deployment", "  replicas: 3").replace("8080", "8081"))

    assert two == three[:2]
    assert not {pod["metadata"]["name"] for pod in changed} & {pod["metadata"]["name"] for pod in three}


def test_pods_are_spread_within_and_over_owners() -> None:
    pods = pods_of(
        workload("Deployment", "  replicas: 4"), workload("StatefulSet", "  replicas: 2", name="db")
    )

    assert nodes_of(pods) == ["node1", "node2", "node3", "node1", "node2", "node3"]


@pytest.mark.parametrize(
    ("spec", "node"),
    [
        ("nodeName: node3", "node3"),
        ("nodeSelector: {kubernetes.io/hostname: node2}", "node2"),
        ("nodeSelector: {disk: fast}", ""),
        ("nodeName: node9", "node9"),
    ],
)
def test_a_pod_goes_where_it_must(spec: str, node: str) -> None:
    found = expanded(pod("one", f"{spec}, {CONTAINERS}"))

    assert nodes_of(list(found.of("Pod").values())) == [node]
    assert bool(found.notes) == (node not in {"node2", "node3"})


def test_a_daemon_set_follows_its_node_selector() -> None:
    text = workload("DaemonSet").replace(
        "spec: {containers", "spec: {nodeSelector: {kubernetes.io/hostname: node2}, containers"
    )

    assert nodes_of(pods_of(text)) == ["node2"]


@settings(deadline=None)  # others may be using the machine
@given(st.permutations(["a", "b", "c", "d", "e"]), st.integers(0, 4))
def test_a_bound_pod_stays_whatever_comes_and_goes(order: list[str], kept: int) -> None:
    before = expanded(*(pod(name) for name in order)).objects
    left = order[kept:]

    after = expanded(*(pod(name) for name in ["new", *left]), before=before).objects

    for name in left:
        key = Key("Pod", "default", name)
        assert after[key]["spec"]["nodeName"] == before[key]["spec"]["nodeName"]


def test_namespaces_carry_their_name_and_default_is_there() -> None:
    found = expanded("apiVersion: v1\nkind: Namespace\nmetadata: {name: team, labels: {a: b}}").of(
        "Namespace"
    )

    labels = {key.name: item["metadata"]["labels"] for key, item in found.items()}
    assert labels["team"] == {"a": "b", "kubernetes.io/metadata.name": "team"}
    assert labels["default"] == {"kubernetes.io/metadata.name": "default"}


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("apiVersion: v1\nkind: Node\nmetadata: {name: n}", "Node n is left out"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}", "ConfigMap default/c is left out"),
        (pod("one", f"affinity: {{nodeAffinity: {{}}}}, {CONTAINERS}"), "affinity is not followed"),
        (workload("Job").replace("apps/", "batch/"), "nothing finishes"),
    ],
)
def test_what_is_not_done_is_said(text: str, note: str) -> None:
    assert any(note in found for found in expanded(text).notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- 1", "not an object"),
        ("kind: pod\nmetadata: {name: a}", "kind"),
        ("kind: Pod", "metadata is missing"),
        ("kind: Pod\nmetadata: {name: ../../etc}", "metadata.name"),
        ("kind: Pod\nmetadata: {name: a, namespace: a.b}", "metadata.namespace"),
        ("kind: Pod\nmetadata: {name: a, labels: {on: true}}", "quotation marks"),
        ("apiVersion: v2\nkind: Pod\nmetadata: {name: a}", "apiVersion"),
        (pod("a", metadata=", namespace: nowhere"), "there is no Namespace nowhere"),
        (pod("a", "containers: []"), "spec.containers"),
        (
            pod("a", "containers: [{ports: [{containerPort: 0}]}]"),
            "spec.containers[0].ports[0].containerPort",
        ),
        (pod("a", "containers: [{ports: [{containerPort: 1, protocol: tcp}]}]"), "protocol"),
        (workload("Deployment", "  replicas: many"), "spec.replicas"),
        (workload("Deployment").replace("app: web}}\n  temp", "app: api}}\n  temp"), "spec.selector"),
        ("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}", "spec.template"),
    ],
)
def test_bad_input_names_object_and_field(text: str, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        expanded(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "restart"),
    [
        ({"metadata": {"name": "a", "labels": {"a": "b"}}}, False),
        ({"metadata": {"name": "a", "annotations": {"note": "b"}}}, False),
        ({"metadata": {"name": "a", "annotations": {"kubernetes.io/ingress-bandwidth": "1M"}}}, True),
        ({"metadata": {"name": "a", "labels": {"controller-revision-hash": "b"}}}, True),
        ({"spec": {"hostNetwork": True}}, True),
    ],
)
def test_labels_change_in_place(change: Object, restart: bool) -> None:
    before = {"metadata": {"name": "a"}, "spec": {}}

    assert must_restart(before, {**before, **change}) is restart


def test_ports_of_all_containers_each_once() -> None:
    first, second = "ports: [{containerPort: 1}, {containerPort: 2}]", "ports: [{containerPort: 1}]"
    [found] = pods_of(pod("a", f"containers: [{{{first}}}, {{{second}}}]"))

    assert container_ports(found) == (1, 2)
