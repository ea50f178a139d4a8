"""Policies as drawings and as manifests, and what a manifest would do."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.cluster.documents import parse
from agent.cluster.model import NAMESPACE_NAME_LABEL, Namespace, NetworkPolicy, Pod
from agent.cluster.store import snapshot_of
from agent.explain.world import World
from agent.ui.drawing import drawing
from agent.ui.manifest import policy_text
from agent.ui.rehearsal import UnreadableError, rehearsed

PODS = (
    Pod("shop", "web", labels={"app": "web"}, phase="Running", ips=(ip_address("10.0.0.1"),)),
    Pod("data", "db", labels={"app": "db"}, phase="Running", ips=(ip_address("10.0.0.2"),)),
    Pod("data", "tool", labels={"app": "tool"}, phase="Running", ips=(ip_address("10.0.0.3"),)),
)
SPACES = tuple(Namespace(name, labels={NAMESPACE_NAME_LABEL: name}) for name in ("shop", "data"))

ALL = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: all, namespace: data, annotations: {podwall.dev/mode: audit}}
spec:
  podSelector:
    matchLabels: {app: db}
    matchExpressions: [{key: tier, operator: NotIn, values: [a, b]}, {key: x, operator: DoesNotExist}]
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}
      podSelector: {matchLabels: {app: web}}
    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
    ports: [{protocol: TCP, port: 5432, endPort: 5440}, {protocol: UDP}, {protocol: TCP, port: http}]
  - {}
  egress:
  - to: [{podSelector: {}}]
"""
DENY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: data}
spec: {podSelector: {matchLabels: {app: db}}}
"""


def policy(text: str) -> NetworkPolicy:
    read = parse(Path("test.yaml"), text.encode())
    assert not read.errors
    (found,) = [item for _, item in read.found]
    assert isinstance(found, NetworkPolicy)
    return found


def world(*policies: NetworkPolicy) -> World:
    return World(snapshot_of((*SPACES, *PODS, *policies)))


def test_a_manifest_that_was_written_from_a_policy_means_the_same() -> None:
    for text in (ALL, DENY):
        assert policy(policy_text(policy(text))) == policy(text)


def test_a_rule_of_which_nothing_is_usable_is_not_written_as_one_for_everybody() -> None:
    broken = policy(DENY.replace("}}}", "}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.300/8}}]}]}"))
    assert broken.problems
    written = policy_text(broken)
    assert written.startswith("# cannot be used: spec.ingress[0].from[0].ipBlock.cidr")
    assert policy(written).ingress == ()


def test_a_problem_cannot_leave_its_comment() -> None:
    broken = policy(DENY.replace("}}}", '}}, ingress: [{from: [{ipBlock: {cidr: "x\\nkind: Pod"}}]}]}'))
    assert [line for line in policy_text(broken).splitlines() if line.startswith("kind")] == [
        "kind: NetworkPolicy"
    ]


def test_a_drawing_names_who_may_reach_whom() -> None:
    found = drawing(world(policy(ALL)), policy(ALL))
    assert found["selected"] == {"total": 1, "ids": ["pod/data/db"]}
    assert found["audit"]
    first, everybody = found["ingress"]["rules"]
    pods, block = first["peers"]
    assert (pods["kind"], pods["pods"]["ids"]) == ("pods", ["pod/shop/web"])
    assert (block["kind"], block["words"]) == ("block", "10.0.0.0/8 except 10.1.0.0/16")
    assert first["ports"] == ["TCP 5432-5440", "every UDP port", "TCP http"]
    assert [peer["kind"] for peer in everybody["peers"]] == ["everybody"]
    assert found["egress"]["rules"][0]["peers"][0]["pods"]["total"] == 2


def test_a_direction_that_a_policy_does_not_speak_of_is_open() -> None:
    found = drawing(world(policy(DENY)), policy(DENY))
    assert found["ingress"] == {"isolates": True, "rules": []}
    assert found["egress"] == {"isolates": False, "rules": []}


def test_a_rehearsal_says_what_closes() -> None:
    found = rehearsed(world(), DENY, "default", ())
    assert found["changed"] == ["NetworkPolicy data/deny"]
    assert found["closes"]
    assert {row["change"] for row in found["rows"]} == {"closes"}
    assert "pod/shop/web" in {of for row in found["rows"] for group in row["sources"] for of in group["ids"]}
    assert {of for row in found["rows"] for group in row["targets"] for of in group["ids"]} == {"pod/data/db"}


def test_what_is_so_already_changes_nothing() -> None:
    found = rehearsed(world(policy(DENY)), DENY, "default", ())
    assert (found["changed"], found["rows"], found["closes"]) == ([], [], False)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "there is no NetworkPolicy"), ("kind: [", "the manifest, document 1"), ("a: b", "the manifest")],
    ids=["nothing", "broken", "no object"],
)
def test_a_manifest_that_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(UnreadableError, match=said):
        rehearsed(world(), text, "default", ())
