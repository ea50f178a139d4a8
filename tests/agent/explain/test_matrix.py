"""Every pair of a matrix is decided as `why`, the evaluator's rules and the documentation decide it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings

from agent.cluster.model import Direction, Pod
from agent.cluster.store import snapshot_of
from agent.explain.ends import columns_named, pods_named, takes_part, workload_of
from agent.explain.groups import OTHERWISE, SELF, SOME, grouped, word
from agent.explain.matrix import Column, Matrix, columns_of, matrix, sentence
from agent.explain.policy import Packet, judge
from agent.explain.seen import Seen, attempt, differs
from agent.explain.world import UnknownNameError, World
from lab.expectation import FirstPacket, Oracle
from tests.agent.compile.test_policy_property import SEEDS, SETTINGS, Chance
from tests.agent.compile.worlds import NODE, decoded, namespace, pod, policy
from tests.agent.compile.worlds import World as Rules

DIRECTIONS: tuple[Direction, Direction] = ("Egress", "Ingress")
FEWER = settings(SETTINGS, max_examples=150)
MORE_PORTS = (("TCP", 80), ("UDP", 53), ("SCTP", 80), ("TCP", 8080))


def world_of(objects: list[dict[str, Any]]) -> World:
    return World(snapshot_of(decoded(of) for of in objects))


def everything(world: World) -> Matrix:
    """All Pods that can send or receive, at their ports and at some that they do not declare."""
    pods = [pod for _, pod in sorted(world.snapshot.pods.items()) if takes_part(pod)]
    said = {(each.target.key, each.protocol, each.port): each for each in columns_of(pods)}  # type: ignore[union-attr]
    for of, (protocol, port) in product(pods, MORE_PORTS):
        said.setdefault((of.key, protocol, port), Column(of, protocol, port))  # type: ignore[arg-type]
    return matrix(world, pods, said.values())


@FEWER
@given(SEEDS)
def test_a_pair_is_decided_as_it_is_alone(seed: int) -> None:
    world = world_of(Chance(seed).cluster())

    for source, column, cell in everything(world).cells():
        for way in cell:
            packet = Packet(way.source, way.destination, column.protocol, column.port)
            denying = [of for of in DIRECTIONS if not judge(world, of, packet).allowed]
            assert way.allowed == (not denying), (source.key, column, way)
            assert way.cause == (f"{denying[0].lower()}-denied" if denying else "allowed")


@FEWER
@given(SEEDS)
def test_a_pair_is_decided_as_the_rules_and_the_documentation_do(seed: int) -> None:
    """Between Pods of one node, where its rules are the whole way; the node itself always reaches them."""
    objects = Chance(seed).cluster()
    world, rules, oracle = world_of(objects), Rules(*objects), Oracle(objects)
    own = [
        pod
        for _, pod in sorted(world.snapshot.pods.items())
        if pod.node == NODE and takes_part(pod) and not pod.host_network
    ]
    for _, column, cell in matrix(world, own, columns_of(own, port=80)).cells():
        for way in cell:
            probe = FirstPacket(str(way.source), str(way.destination), column.protocol, column.port)
            assert way.allowed == rules.judge(probe).accepted == oracle.allows(probe), probe


@FEWER
@given(SEEDS)
def test_groups_hide_nothing(seed: int) -> None:
    """A cell between groups is what each of its pairs is, or says that they are not all alike."""
    decided = everything(world_of(Chance(seed).cluster()))
    shown = grouped(decided)

    assert sorted(i for row in shown.rows for i in row.members) == list(range(len(decided.sources)))
    assert sorted(i for column in shown.columns for i in column.members) == list(range(len(decided.columns)))
    for row, words in zip(shown.rows, shown.cells, strict=True):
        for column, said in zip(shown.columns, words, strict=True):
            pairs = {
                word(decided.sources[i], decided.columns[j], decided.rows[i][j])
                for i, j in product(row.members, column.members)
            }
            assert pairs - {SELF} in ({said}, set()) or (said == SOME and len(pairs - {SELF}) > 1)


# What is and what is not there


def owned(path: str, ip: str, kind: str, owner: str, **labels: str) -> dict[str, Any]:
    made = pod(path, ip, ports=[("http", 8080)], **labels)
    by = {"apiVersion": "apps/v1", "kind": kind, "name": owner, "uid": "u", "controller": True}
    made["metadata"]["ownerReferences"] = [by]
    return made


SHOP = [
    namespace("shop"),
    owned("shop/web-5f7-a", "10.244.0.2", "ReplicaSet", "web-5f7", app="web", **{"pod-template-hash": "5f7"}),
    owned("shop/web-5f7-b", "10.244.0.3", "ReplicaSet", "web-5f7", app="web", **{"pod-template-hash": "5f7"}),
    owned("shop/db-0", "10.244.0.4", "StatefulSet", "db", app="db"),
    pod("shop/tool", "10.244.0.5", app="tool"),
]
ONLY_WEB = policy(
    "shop/db",
    podSelector={"matchLabels": {"app": "db"}},
    ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 8080}]}],
)


def shop(*more: dict[str, Any]) -> World:
    return world_of([*SHOP, *more])


def named(world: World, *names: str) -> list[Pod]:
    return [pod for name in names for pod in pods_named(world, name, "shop")]


def test_replicas_that_may_do_the_same_share_a_row() -> None:
    world = shop(ONLY_WEB)
    pods = named(world, "shop/*")
    shown = grouped(matrix(world, pods, columns_of(pods)))

    assert [row.label for row in shown.rows] == ["db", "tool", "web (2)"]
    assert [column.label for column in shown.columns] == ["db", "web (2)"]
    assert shown.ports == ("TCP 8080", "TCP 8080")
    assert shown.cells == ((SELF, "yes"), ("no", "yes"), ("yes", "yes"))


def test_a_replica_that_is_otherwise_gets_a_row_of_its_own() -> None:
    world = shop(policy("shop/one", podSelector={"matchLabels": {"app": "db"}},
                        ingress=[{"from": [{"ipBlock": {"cidr": "10.244.0.2/32"}}]}]))  # fmt: skip
    pods = named(world, "web", "db")
    shown = grouped(matrix(world, pods, columns_of(named(world, "db"))))

    assert [row.label for row in shown.rows] == ["web-5f7-a", "web-5f7-b", "db"]
    assert shown.cells == (("yes",), ("no",), (SELF,))


def test_what_was_seen_otherwise_is_marked() -> None:
    world = shop(ONLY_WEB)
    decided = matrix(world, named(world, "tool"), columns_of(named(world, "db")))
    ((source, column, (way,)),) = decided.cells()
    seen = {attempt(source, column, way): Seen("connected")}

    assert grouped(decided, seen).cells == ((f"no{OTHERWISE}",),)
    assert sentence(world, source, column, way).startswith(
        "denied: ingress policy shop/db of Pod shop/db-0 does not let Pod shop/tool in on TCP 8080"
    )


@pytest.mark.parametrize(
    ("protocol", "verdict", "if_allowed", "if_denied"),
    [
        ("TCP", "connected", False, True),
        ("TCP", "refused", False, True),
        ("TCP", "silent", True, False),
        ("TCP", "unreachable", True, False),
        ("TCP", "failed", False, False),
        ("UDP", "connected", False, True),
        ("UDP", "refused", False, True),
        ("UDP", "silent", False, False),
        ("SCTP", "silent", True, False),
    ],
)
def test_when_seen_and_decided_differ(protocol: Any, verdict: str, if_allowed: bool, if_denied: bool) -> None:
    for policies, wanted in (((), if_allowed), ((policy("shop/shut"),), if_denied)):
        world = shop(*policies)
        decided = matrix(world, named(world, "tool"), [Column(named(world, "db")[0], protocol, 80)])
        ((_, column, (way,)),) = decided.cells()
        assert way.allowed == (not policies)
        assert differs(column, way, Seen(verdict)) is wanted


def test_who_takes_part() -> None:
    """Who has ended or has no address does not; a Pod on its node's network is asked by no policy."""
    world = shop(
        policy("shop/shut"),
        pod("shop/done", "10.244.0.9", phase="Succeeded"),
        pod("shop/waits"),
        pod("shop/agent", "192.168.10.1", host_network=True, ports=[("metrics", 9100)]),
    )
    pods = named(world, "shop/*")
    assert [pod.name for pod in pods] == ["agent", "db-0", "tool", "web-5f7-a", "web-5f7-b"]

    shown = grouped(matrix(world, pods, columns_of(pods)))
    assert shown.cells[0] == (SELF, "no", "no")
    assert [words[0] for words in shown.cells] == [SELF, "yes", "yes", "yes"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("web", "web-5f7-a web-5f7-b"),
        ("shop/web", "web-5f7-a web-5f7-b"),
        ("deploy/shop/web", "web-5f7-a web-5f7-b"),
        ("sts/db", "db-0"),
        ("db-0", "db-0"),
        ("pod/db-0", "db-0"),
        ("*/*", "db-0 tool web-5f7-a web-5f7-b"),
    ],
)
def test_whom_a_name_means(name: str, found: str) -> None:
    assert " ".join(pod.name for pod in named(shop(), name)) == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody", "'nobody' is no Pod or workload with Pods in namespace shop"),
        ("gone/web", "'gone/web': there is no namespace gone"),
        ("pod/web", "'pod/web' is no Pod or workload with Pods in namespace shop"),
        ("web:99999", "port 99999 is not from 1 to 65535"),
        ("web:https", "'web:https' has no port https"),
        ("tool", "'tool' declares no port: write it as NAME:PORT"),
        ("203.0.113.10", "which port of 203.0.113.10 (outside the cluster)? Write it as NAME:PORT"),
        ("a:b:c", "'a:b:c' is no Pod or workload with Pods in namespace shop"),
    ],
)
def test_names_that_mean_nobody(name: str, said: str) -> None:
    with pytest.raises(UnknownNameError) as refused:
        columns_named(shop(), name, "shop")
    assert str(refused.value) == said


def test_what_made_a_pod() -> None:
    world = shop()
    assert {workload_of(pod)[::2] for pod in world.snapshot.pods.values()} == {
        ("Deployment", "web"),
        ("StatefulSet", "db"),
        ("Pod", "tool"),
    }
