"""What a plan says opens and closes is what the documentation says of both states, packet by packet."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest
from hypothesis import given

from agent.cluster.model import PROTOCOLS, Key, Kind, Protocol
from agent.cluster.store import Snapshot, snapshot_of
from agent.explain.overlay import laid_over
from agent.explain.plan import LiveFlow, Plan, cuts, plan, rows
from agent.explain.reach import Group, Way, changes, groups
from agent.explain.spans import EVERYTHING, contains, in_words, joined, pieces, without
from agent.explain.world import World
from lab.expectation import FirstPacket, Oracle
from lab.limits import SLOWNESS
from tests.agent.compile.test_policy_property import (
    NAMESPACES,
    SEEDS,
    SETTINGS,
    Chance,
    probes,
)
from tests.agent.compile.worlds import NODE, NODE_ADDRESSES, decoded, namespace, pod, policy

Manifests = list[dict[str, Any]]
OF_API = {"podSelector": {"matchLabels": {"app": "api"}}}
FROM_WEB = [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}]
NODES = [
    {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }
    for name, addresses in ((NODE, NODE_ADDRESSES), ("node-2", ("192.168.10.2", "fd00:10::2")))
]
SHOP = [
    *NODES,
    namespace("shop"),
    namespace("other"),
    pod("shop/api", "10.244.0.2", "fd00:10:244::2", ports=[("http", 8080)], app="api"),
    pod("shop/web", "10.244.0.3", app="web"),
    pod("other/job", "10.244.0.4", node="node-2", app="job"),
]


def audited(of: dict[str, Any]) -> dict[str, Any]:
    return {**of, "metadata": {**of["metadata"], "annotations": {"podwall.dev/mode": "audit"}}}


def snapshot(objects: Iterable[dict[str, Any]]) -> Snapshot:
    return snapshot_of(decoded(of) for of in objects)


def planned(before: Manifests, *change: dict[str, Any], gone: Iterable[tuple[Kind, Key]] = ()) -> Plan:
    was = snapshot(before)
    laid = laid_over(was, map(decoded, change), gone)
    return plan(World(was), World(laid.snapshot), laid.changed)


def said(of: Plan) -> list[tuple[str, list[str], list[str], str]]:
    return [(row.change, _names(row.sources), _names(row.targets), in_words(row.spans)) for row in of.rows]


def _names(groups: Iterable[Group]) -> list[str]:
    names = (group.kind if group.kind == "nodes" else name for group in groups for name in group.names)
    return list(dict.fromkeys(names))


def test_a_new_policy() -> None:
    made = planned(SHOP, policy("shop/api", **OF_API, ingress=FROM_WEB))
    assert [each for each in said(made) if "/0" not in str(each)] == [
        ("closes", ["shop/web"], ["shop/api"], "every port but TCP 8080"),
    ]
    assert ("closes", ["other/job", "nodes", "0.0.0.0/0", "::/0"], ["shop/api"], "every port") in said(made)
    assert made.sentences == (
        "NetworkPolicy shop/api (new) isolates 1 Pod of shop for ingress; it lets in what comes from Pods "
        "app=web of its own namespace on TCP http",
    )
    assert made.closes


def test_taking_it_away_opens_what_it_closed() -> None:
    of = policy("shop/api", **OF_API, ingress=FROM_WEB)
    closing, opening = planned(SHOP, of), planned([*SHOP, of], gone=[("NetworkPolicy", ("shop", "api"))])
    assert [("opens", *row[1:]) for row in said(closing)] == said(opening)
    assert not opening.closes
    assert opening.sentences == (
        "NetworkPolicy shop/api (removed) no longer isolates 1 Pod of shop; nothing else isolates 1 of them",
    )


def test_a_policy_in_audit_mode_closes_nothing_until_it_is_enforced() -> None:
    of = policy("shop/api", **OF_API, ingress=FROM_WEB)
    made = planned(SHOP, audited(of))
    assert (made.rows, made.closes) == ((), False)
    assert made.sentences[0].startswith(
        "NetworkPolicy shop/api (new) is in audit mode: it would isolate 1 Pod"
    )
    assert said(planned([*SHOP, audited(of)], of)) == said(planned(SHOP, of))
    enforced = planned([*SHOP, audited(of)], of)
    assert enforced.sentences[0].startswith("NetworkPolicy shop/api (changed) leaves audit mode and isolates")


def test_labels_of_a_pod_and_of_a_namespace() -> None:
    friends = [{"from": [{"namespaceSelector": {"matchLabels": {"team": "friends"}}}]}]
    base = [*SHOP, policy("shop/api", **OF_API, ingress=friends)]
    made = planned(base, namespace("other", team="friends"))
    assert said(made) == [("opens", ["other/job"], ["shop/api"], "every port")]
    assert made.sentences == ("Namespace other (changed): team= becomes friends",)

    relabelled = pod("shop/api", "10.9.9.9", app="other")
    away = planned(base, relabelled)
    assert {row[0] for row in said(away)} == {"opens"}
    assert "before by shop/api" in away.sentences[0]
    assert World(laid_over(snapshot(base), [decoded(relabelled)]).snapshot).pod_at(ip_address("10.244.0.2"))


def test_what_cannot_be_used_and_what_is_not_there() -> None:
    bad = policy("shop/api", ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}])
    made = planned(SHOP, bad)
    assert made.unusable[0].startswith("NetworkPolicy shop/api: spec.ingress[0].from[0].ipBlock.cidr: ")
    laid = laid_over(snapshot(SHOP), [decoded(policy("gone/x"))], [("NetworkPolicy", ("shop", "nobody"))])
    assert (laid.unsaid, laid.missing) == (("gone",), (("NetworkPolicy", ("shop", "nobody")),))


def test_a_namespace_takes_along_what_is_in_it() -> None:
    laid = laid_over(snapshot(SHOP), [], [("Namespace", "shop")])
    assert [(each.kind, each.key) for each in laid.changed] == [
        ("Namespace", "shop"), ("Pod", ("shop", "api")), ("Pod", ("shop", "web")),
    ]  # fmt: skip


def ready(of: dict[str, Any]) -> dict[str, Any]:
    return {**of, "status": {**of["status"], "conditions": [{"type": "Ready", "status": "True"}]}}


def test_a_service_that_loses_its_endpoints() -> None:
    def service(app: str) -> dict[str, Any]:
        spec = {
            "selector": {"app": app},
            "clusterIP": "10.96.0.7",
            "ports": [{"port": 80, "targetPort": "http"}],
        }
        meta = {"namespace": "shop", "name": "api"}
        return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}

    base = [*(ready(of) if of["kind"] == "Pod" else of for of in SHOP), service("api")]
    made = planned(base, service("apl"))
    (backing,) = made.services
    assert (backing.service, backing.before, backing.after) == (("shop", "api"), ("shop/api:8080",), ())
    assert made.closes
    assert planned(base, service("api")).services == ()


def flow(source: str, target: str, node: str, port: int = 8080, sport: int = 40000) -> LiveFlow:
    return LiveFlow(node, "tcp", ip_address(source), sport, ip_address(target), port)


def test_the_flows_that_end_are_those_that_their_pods_node_would_deny() -> None:
    after = World(snapshot([*SHOP, policy("shop/api", **OF_API, ingress=FROM_WEB)]))
    job, web, api = "10.244.0.4", "10.244.0.3", "10.244.0.2"
    ending = flow(job, api, NODE)
    flows = [
        ending,
        flow(job, api, "node-2"),  # the same, told by the other end's node
        flow(web, api, NODE),
        flow(web, api, NODE, port=9090),
        flow("192.168.10.1", api, NODE),  # its own node
        flow("fd00:10:244::", "fd00:10:244::2", NODE)._replace(from_node=True),
        flow(api, job, NODE),
    ]
    found = list(cuts(after, flows))
    assert [(cut.flow, cut.reason) for cut in found] == [
        (ending, "ingress of shop/api by shop/api"),
        (flow(web, api, NODE, port=9090), "ingress of shop/api by shop/api"),
    ]


def test_rows_join_who_shares_targets_and_ports() -> None:
    a, b, c = (Group("pods", (f"shop/{name}",), ()) for name in "abc")
    ways = [Way("closes", *pair, EVERYTHING, 0) for pair in ((a, b), (b, a), (c, a), (c, b))]
    (row,) = rows(ways)
    assert ({*row.sources}, {*row.targets}) == ({a, b, c}, {a, b})


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        (EVERYTHING, "every port"),
        (((0, 65535),), "every TCP port"),
        (((80, 80), (443, 450), (65536 + 53, 65536 + 53)), "TCP 80, TCP 443-450, UDP 53"),
        (without(EVERYTHING, ((8080, 8080),)), "every port but TCP 8080"),
        (((196608, 196608),), "ICMP and the like"),
        (without(EVERYTHING, ((196608, 196608),)), "every port but ICMP and the like"),
    ],
)
def test_ports_in_words(spans: Any, words: str) -> None:
    assert in_words(spans) == words
    assert joined([spans, without(EVERYTHING, spans)]) == EVERYTHING
    assert sum(1 for _ in pieces(spans)) >= len(spans)


# Random changes


@SETTINGS
@given(SEEDS)
def test_it_says_of_every_packet_what_the_documentation_does(seed: int) -> None:
    chance = Chance(seed)
    before = [*NODES, *map(namespace, NAMESPACES), *_distinct(chance.cluster())]
    change = [_edited(chance, of) for of in before if of["kind"] != "Node" and chance.happens(3)]
    change += chance.some(chance.policy, 0, 1, 2)
    gone = {_key(of) for of in before if of["kind"] == "NetworkPolicy" and chance.happens(2)}
    was = snapshot(_distinct(before))
    laid = laid_over(was, map(decoded, change), [("NetworkPolicy", key[1:]) for key in gone])
    worlds = World(was), World(laid.snapshot)
    blocks = [ip_network(of.names[0]) for of in groups(*worlds) if of.kind == "outside"]
    told = _Told(worlds[0], blocks, changes(*worlds))
    later = [of for of in _distinct([*before, *change]) if _key(of) not in gone]
    oracles = Oracle(_distinct(before)), Oracle(later)

    wrong = []
    for probe in probes(before, 60):
        was_allowed, is_allowed = (oracle.allows(probe) for oracle in oracles)
        right = [] if was_allowed == is_allowed else ["opens" if is_allowed else "closes"]
        if not told.is_one_pod(probe) and told.of(probe) != right:
            wrong.append((probe, told.of(probe), right))

    assert wrong == []


def _edited(chance: Chance, of: dict[str, Any]) -> dict[str, Any]:
    """Another version; of a Pod only its labels are anybody's to change."""
    if of["kind"] == "Pod":
        return {**of, "metadata": {**of["metadata"], "labels": chance.labels()}}
    return chance.edited(of)


def _distinct(objects: Manifests) -> Manifests:
    return list({_key(of): of for of in objects}.values())


def _key(of: dict[str, Any]) -> tuple[str, str, str]:
    return of["kind"], of["metadata"].get("namespace", ""), of["metadata"]["name"]


@dataclass(frozen=True)
class _Told:
    """Which ways a packet belongs to."""

    world: World
    blocks: list[Any]
    ways: tuple[Way, ...]

    def of(self, probe: FirstPacket) -> list[str]:
        """Twice the same would be a mistake too."""
        source, target = ip_address(probe.source), ip_address(probe.target)
        return [
            way.change
            for way in self.ways
            if way.family in (0, source.version)
            and self._name(source) in way.source.names
            and self._name(target) in way.target.names
            and _has(way, probe)
        ]

    def is_one_pod(self, probe: FirstPacket) -> bool:
        one, other = (self.world.pod_at(ip_address(each)) for each in (probe.source, probe.target))
        return one is not None and one is other

    def _name(self, address: Any) -> str:
        if pod := self.world.pod_at(address):
            return "/".join(pod.key)
        if node := self.world.node_at(address):
            return node.name
        inside = [each for each in self.blocks if each.version == address.version and address in each]
        return str(max(inside, key=lambda of: of.prefixlen))


def _has(way: Way, probe: FirstPacket) -> bool:
    if probe.port is None:
        return way.spans[-1][1] == EVERYTHING[-1][1]
    if probe.protocol not in PROTOCOLS:
        return way.spans[-1][1] == EVERYTHING[-1][1]
    return contains(way.spans, cast("Protocol", probe.protocol), probe.port)


def test_a_hundred_pods_with_labels_of_their_own_take_less_than_two_seconds() -> None:
    pods = [
        pod(f"{NAMESPACES[n % 2]}/pod-{n}", f"10.244.1.{n}", f"fd00:10:244::1:{n:x}", app=f"app-{n}")
        for n in range(1, 101)
    ]
    rules = [
        policy(
            f"{NAMESPACES[n % 2]}/policy-{n}",
            podSelector={"matchLabels": {"app": f"app-{n}"}},
            ingress=[
                {"from": [{"podSelector": {"matchLabels": {"app": f"app-{n + 2}"}}}], "ports": [{"port": 80}]}
            ],
        )
        for n in range(1, 101)
    ]
    base = [*NODES, *map(namespace, NAMESPACES), *pods, *rules]
    denials = [policy(f"{space}/deny", policyTypes=["Ingress", "Egress"]) for space in NAMESPACES]
    begun = time.process_time()  # what it takes where nobody else works
    made = planned(base, *denials)
    seconds = time.process_time() - begun

    assert made.closes
    assert seconds < 2 * SLOWNESS
