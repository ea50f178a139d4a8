"""Manifests of a cluster that never ran: their workloads' Pods are judged by labels and ports."""

from __future__ import annotations

from typing import Any

import pytest

from agent.cluster.store import snapshot_of
from agent.explain.ends import workload_of
from agent.explain.imagined import with_addresses, with_pods
from tests.agent.compile.worlds import decoded, namespace, pod


def workload(kind: str, replicas: Any = None, **metadata: Any) -> dict[str, Any]:
    template = {
        "metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{"name": "main", "ports": [{"name": "http", "containerPort": 80}]}]},
    }
    spec: dict[str, Any] = (
        {"template": template} if replicas is None else {"template": template, "replicas": replicas}
    )
    if kind == "CronJob":
        spec = {"jobTemplate": {"spec": spec}}
    return {"kind": kind, "metadata": {"namespace": "shop", "name": "web", **metadata}, "spec": spec}


CASES = [
    ("one", workload("Deployment"), ["web-1"]),
    ("two stand for all", workload("StatefulSet", 7), ["web-1", "web-2"]),
    ("none is wanted", workload("Deployment", 0), []),
    ("a number that is none", workload("Deployment", "many"), ["web-1"]),
    ("a CronJob's", workload("CronJob"), ["web-1"]),
    ("of another workload", workload("ReplicaSet", ownerReferences=[{"kind": "Deployment"}]), []),
    ("nothing that makes Pods", workload("Widget"), []),
    ("no name", workload("Deployment", name=None), []),
    ("no template", {"kind": "Deployment", "metadata": {"name": "web"}, "spec": None}, ["web-1"]),
]


@pytest.mark.parametrize(("body", "names"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_pods_of_templates(body: dict[str, Any], names: list[str]) -> None:
    snapshot, made = with_pods(snapshot_of([]), [body])
    assert [pod.name for pod in made] == names
    assert list(snapshot.pods.values()) == list(made)
    assert all(workload_of(pod)[::2] == (body["kind"], "web") for pod in made)
    assert {pod.namespace for pod in made} <= set(snapshot.namespaces)


def test_workloads_with_pods_have_theirs() -> None:
    running = pod("shop/web-5f7-a", "10.244.0.2", **{"pod-template-hash": "5f7"})
    by = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5f7", "uid": "u", "controller": True}
    running["metadata"]["ownerReferences"] = [by]
    snapshot = snapshot_of(map(decoded, [namespace("shop", team="a"), running]))
    assert with_pods(snapshot, [workload("Deployment", 2)]) == (snapshot, ())


def test_addresses_are_given_where_there_are_none() -> None:
    objects = [
        pod("shop/a", "100.64.0.1"),
        pod("shop/b"),
        pod("shop/c"),
        pod("shop/done", phase="Succeeded"),
        pod("shop/agent", host_network=True),
        namespace("shop", team="a"),
    ]
    snapshot, given = with_addresses(snapshot_of(map(decoded, objects)))
    assert [(pod.name, *map(str, pod.ips)) for pod in given] == [("b", "100.64.0.2"), ("c", "100.64.0.3")]
    assert [pod.name for pod in snapshot.pods.values() if not pod.ips] == ["done", "agent"]
    assert snapshot.namespaces["shop"].labels["team"] == "a"
