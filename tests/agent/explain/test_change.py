"""What documents come to as a change: objects, workloads, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cluster.documents import Document, Place, parse
from agent.cluster.store import snapshot_of
from agent.explain.change import Change, Gone, applied, change_of
from agent.explain.ends import Workload
from tests.agent.compile.worlds import decoded, namespace, pod, policy

BASE = [namespace("shop"), pod("shop/api", "10.244.0.2", app="api")]


def workload(kind: str, path: str, app: str = "web", version: str = "apps/v1") -> dict[str, Any]:
    space, name = path.split("/")
    template = {"metadata": {"labels": {"app": app}}, "spec": {"containers": [{"name": "main"}]}}
    spec = {"template": template, "jobTemplate": {"spec": {"template": template}}}
    meta = {"namespace": space, "name": name}
    return {"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}


def written(*objects: dict[str, Any]) -> Change:
    read = parse(Path("change.yaml"), yaml.safe_dump_all(objects).encode())
    assert not read.errors
    return change_of(read.documents, "asked")


def notes(change: Change, *base: dict[str, Any]) -> tuple[str, ...]:
    return applied(snapshot_of(map(decoded, base or BASE)), change).notes


def test_what_says_no_namespace_is_of_the_one_that_is_asked() -> None:
    objects = [policy("x/deny"), workload("Deployment", "x/web"), namespace("team")]
    for each in objects:
        each["metadata"].pop("namespace", None)
    change = written(*objects)
    assert [item.key for item in change.objects] == [("asked", "deny"), "team"]
    assert [*change.templates] == [("Deployment", "asked", "web")]


@pytest.mark.parametrize(
    ("version", "kind", "name"),
    [
        ("v1", "ConfigMap", "ConfigMap"),
        ("v1", "Endpoints", "Endpoints"),
        ("networking.k8s.io/v1", "Ingress", "Ingress of networking.k8s.io"),
        ("projectcalico.org/v3", "NetworkPolicy", "NetworkPolicy of projectcalico.org"),
        ("serving.knative.dev/v1", "Service", "Service of serving.knative.dev"),
        ("batch.volcano.sh/v1alpha1", "Job", "Job of batch.volcano.sh"),
    ],
)
def test_other_kinds_are_named_and_left_out(version: str, kind: str, name: str) -> None:
    change = written({"apiVersion": version, "kind": kind, "metadata": {"name": "x"}})
    assert (change.objects, change.templates) == ((), {})
    assert change.notes == (f"change.yaml, document 1 (line 1): {name} is not looked at",)


def test_an_object_that_cannot_be_read_is_named_by_its_place() -> None:
    place = Place(Path("change.yaml"), 2, 7)
    change = change_of([Document(place, {"apiVersion": "v1", "kind": "Pod", "metadata": {}})], "asked")
    assert list(map(str, change.errors)) == [
        "change.yaml, document 2 (line 7): Pod (without a name): metadata.name: is missing"
    ]


def test_a_template_that_cannot_be_read_is_named_by_its_field() -> None:
    bad = workload("Deployment", "shop/web")
    bad["spec"]["template"]["metadata"]["labels"] = {"version": 1}
    change = written(bad)
    assert (change.templates, [str(error).partition(": Expected")[0] for error in change.errors]) == (
        {},
        ["change.yaml, document 1 (line 1): Deployment web: spec.template.metadata.labels"],
    )


def test_a_workload_that_makes_no_pods_is_named() -> None:
    idle, owned = workload("Deployment", "shop/web"), workload("ReplicaSet", "shop/web-abc")
    idle["spec"]["replicas"] = 0
    owned["metadata"]["ownerReferences"] = [{"kind": "Deployment", "name": "web"}]
    change = written(idle, owned)
    assert [note.partition(": ")[2] for note in change.notes] == [
        "Deployment without Pods of its own is not looked at",
        "ReplicaSet without Pods of its own is not looked at",
    ]


@pytest.mark.parametrize(
    ("kind", "version"),
    [("Deployment", "apps/v1"), ("StatefulSet", "apps/v1"), ("Job", "batch/v1"), ("CronJob", "batch/v1")],
)
def test_pods_that_would_be_new_are_not_passed_over_in_silence(kind: str, version: str) -> None:
    change = written(workload(kind, "shop/web", version=version))
    assert notes(change) == (
        f"{kind} shop/web: the Pods that it would make are new, their ways are not compared",
    )


def owned(path: str, kind: str, **labels: str) -> dict[str, Any]:
    of = pod(path, "10.244.0.9", **labels)
    by = {"apiVersion": "apps/v1", "kind": kind, "name": "web", "uid": "", "controller": True}
    return {**of, "metadata": {**of["metadata"], "ownerReferences": [by]}}


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("web", ()),
        ("front", ("StatefulSet shop/web rolls out: its Pods are replaced, and their connections end",)),
    ],
)
def test_a_workload_rolls_out_where_policies_see_a_difference(app: str, said: tuple[str, ...]) -> None:
    change = written(workload("StatefulSet", "shop/web", app))
    base = [namespace("shop"), owned("shop/web-0", "StatefulSet", app="web")]
    made = applied(snapshot_of(map(decoded, base)), change)
    assert made.notes == said
    assert [each.key for each in made.laid.changed] == [("shop", "web-0")] * len(said)


def test_a_namespace_that_is_not_there_is_said_once() -> None:
    change = written(
        policy("gone/deny"), workload("Deployment", "gone/web"), workload("Deployment", "off/web")
    )
    assert [note for note in notes(change) if "namespace" in note] == [
        "namespace gone is not there: apply would fail",
        "namespace off is not there: apply would fail",
    ]


def test_what_is_not_there_cannot_be_deleted() -> None:
    gone = Gone((("NetworkPolicy", ("shop", "deny")), ("Namespace", "team")))
    assert applied(snapshot_of(map(decoded, BASE)), Change(), gone).notes == (
        "NetworkPolicy shop/deny is not there, so it cannot be deleted",
        "Namespace team is not there, so it cannot be deleted",
    )


def test_audits_are_enforced_after_the_rest_of_the_change() -> None:
    audited = policy("shop/deny")
    audited["metadata"]["annotations"] = {"podwall.dev/mode": "audit"}
    laid = applied(snapshot_of(map(decoded, BASE)), written(audited), enforce_audit=True).laid
    assert laid.snapshot.policies["shop", "deny"].mode != "audit"


def test_a_workload_goes_with_its_pods_and_with_no_others() -> None:
    base = [*BASE, owned("shop/web-0", "StatefulSet", app="web")]
    here, elsewhere = Workload("StatefulSet", "shop", "web"), Workload("Deployment", "shop", "web")
    made = applied(snapshot_of(map(decoded, base)), Change(), Gone(workloads=(here, elsewhere)))
    assert [(each.kind, each.key, each.after) for each in made.laid.changed] == [
        ("Pod", ("shop", "web-0"), None)
    ]
    assert made.notes == ("Deployment shop/web has no Pods that could go with it",)
