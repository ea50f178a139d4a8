"""The example's policies in the lab: every pair of Pods on every port, as documented and as written here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from lab.expectation import Expected
from lab.matrix import Matrix, Result, Trial
from lab.world import Lab
from tests.lab.policies import LIMIT, applied, example, namespace, pod, policy

PODS = ("shop", "around")
SHOP = ("shop/api", "shop/postgres", "shop/web")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, given=example(*PODS)) as made:
        yield made


def names(lab: Lab) -> dict[str, str]:
    """Each Pod's owner, so that a table need not know what a Deployment calls its Pods."""
    of_owner = {found.full_name: found.full_name for found in lab.pods()}
    for owner in SHOP:
        of_owner |= {name: owner for name in of_owner if name.startswith(f"{owner}-")}
    return of_owner


def node_of(lab: Lab) -> dict[str, str]:
    return {found.full_name: found.node for found in lab.pods()}


def wrong(seen: Matrix) -> list[str]:
    return [str(result) for result in seen.results if not result.good]


def from_own_node(lab: Lab, result: Result) -> bool:
    return result.trial.source == node_of(lab).get(result.trial.target)


API_MAY = {
    ("ingress-nginx/controller", "shop/api", "TCP", 8080),
    ("monitoring/prometheus", "shop/api", "TCP", 9090),
    ("shop/api", "shop/postgres", "TCP", 5432),
    ("shop/api", "kube-system/dns", "UDP", 53),
    ("shop/api", "kube-system/dns", "TCP", 53),
}


def test_the_api_policy_lets_through_what_it_says_and_nothing_else(lab: Lab) -> None:
    seen = applied(lab, example(*PODS, "api"))

    assert wrong(seen) == []
    name = names(lab)
    found = {
        (
            name.get(trial.source, trial.source),
            name.get(trial.target, trial.target),
            trial.protocol,
            trial.port,
        )
        for result in seen.results
        if (trial := result.trial) and result.connected and not from_own_node(lab, result)
        if "shop/api" in (name.get(trial.source), name.get(trial.target))
    }
    assert found == API_MAY
    versions = {result.trial.address.version for result in seen.results if result.connected}
    assert versions == {4, 6}


def _may_pass(what: str, into: bool, out: bool) -> bool:
    """Whether what leaves (out) or enters (into) the shop passes a default policy."""
    return {
        "default allow": True,
        "deny-ingress": not into,
        "deny-egress": not out,
        "deny-both": not into and not out,
        "allow-all": True,
    }[what]


@pytest.mark.parametrize("what", ["default allow", "deny-ingress", "deny-egress", "deny-both", "allow-all"])
def test_a_default_policy_of_a_namespace(lab: Lab, what: str) -> None:
    files = () if what == "default allow" else (f"defaults/{what}",)
    seen = applied(lab, example(*PODS, *files))

    assert wrong(seen) == []
    assert len(seen.results) > 400
    for result in seen.results:
        trial = result.trial
        into, out = trial.target.startswith("shop/"), trial.source.startswith("shop/")
        assert result.connected == (from_own_node(lab, result) or _may_pass(what, into, out)), str(result)


def test_allow_all_adds_to_what_others_deny(lab: Lab) -> None:
    seen = applied(lab, example(*PODS, "api", "defaults/deny-both", "defaults/allow-all"))

    assert wrong(seen) == []
    assert all(result.connected for result in seen.results)


def test_from_any_of_the_examples_to_any_other(lab: Lab) -> None:
    states = [
        ("api",),
        (),
        ("defaults/deny-both",),
        ("api", "defaults/deny-ingress"),
        ("defaults/allow-all",),
    ]
    for state in [*states, *reversed(states)]:
        assert wrong(applied(lab, example(*PODS, *state))) == [], state


FIELDS = {
    "matchExpressions": {
        "podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["api", "web"]}]},
        "ingress": [
            {
                "from": [
                    {
                        "namespaceSelector": {
                            "matchExpressions": [
                                {
                                    "key": "kubernetes.io/metadata.name",
                                    "operator": "NotIn",
                                    "values": ["monitoring"],
                                }
                            ]
                        },
                        "podSelector": {"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]},
                    },
                    {"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}},
                ]
            }
        ],
    },
    "ipBlock with except": {
        "ingress": [
            {
                "from": [
                    {"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.2.0/24"]}},
                    {"ipBlock": {"cidr": "fd00:10:244::/48", "except": ["fd00:10:244:1::/64"]}},
                    {"ipBlock": {"cidr": "172.30.0.11/32"}},
                ]
            }
        ],
        "egress": [
            {
                "to": [
                    {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.244.0.0/16"]}},
                    {"ipBlock": {"cidr": "::/0", "except": ["fd30::/64"]}},
                ]
            }
        ],
    },
    "endPort": {"ingress": [{"ports": [{"port": 5000, "endPort": 8080}, {"port": 9187, "protocol": "UDP"}]}]},
    "named ports": {
        "ingress": [{"ports": [{"port": "http"}, {"port": "postgres"}]}],
        "egress": [{"ports": [{"port": "http"}, {"port": "dns", "protocol": "UDP"}]}],
    },
    "empty peers, missing peers": {
        "ingress": [{"from": [], "ports": [{"port": 8080}]}, {"ports": [{"port": 5432, "protocol": "UDP"}]}],
        "egress": [{"to": [{"podSelector": {}}]}],
    },
    "a peer in no namespace": {
        "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"no": "such"}}}]}]
    },
    "a protocol without a port": {"ingress": [{"ports": [{"protocol": "UDP"}]}]},
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_field(lab: Lab, what: str) -> None:
    seen = applied(lab, [*example(*PODS), policy("shop/field", **FIELDS[what])])

    assert wrong(seen) == []
    assert {result.connected for result in seen.results} == {True, False}


def test_a_host_network_pod_is_an_ordinary_address(lab: Lab) -> None:
    host = pod("shop/host", 7000, node="node1", labels={"app": "api"})
    host["spec"]["hostNetwork"] = True
    seen = applied(lab, [*example(*PODS, "defaults/deny-both"), host])

    assert wrong(seen) == []
    reached = {
        result.trial.target
        for result in seen.results
        if result.trial.source == "shop/host" and result.connected
    }
    on_its_node = {
        name for name, node in node_of(lab).items() if node == "node1" and name.startswith("shop/")
    }
    assert reached & set(node_of(lab)) >= on_its_node - {"shop/host"}


def test_the_matrix_marks_what_is_not_as_the_policies_say(lab: Lab) -> None:
    """The objects say something else than what is in force: the table shows it and the command would fail."""
    assert wrong(applied(lab, example(*PODS))) == []
    denied = [*lab.objects().values(), policy("shop/not-applied", policyTypes=["Ingress"])]

    seen = lab.matrix(Expected(denied))

    assert not seen.good
    assert "connected, expected denied" in seen.render()
    assert "!!" in seen.render()


def test_what_the_api_server_would_refuse_is_not_judged(lab: Lab) -> None:
    bad = policy("shop/bad", ingress=[{"from": [{"ipBlock": {"cidr": "nonsense"}}]}])
    applied(lab, [*example(*PODS), bad])

    # Nobody knows what to expect of it, so nothing that is expected tells when it is in force.
    deadline = time.monotonic() + LIMIT
    while True:
        seen = lab.matrix(Expected(lab.objects().values()))
        unjudged = [result for result in seen.results if result.trial.expected is None]
        in_force = seen.good and not any(result.connected for result in unjudged)
        if in_force or time.monotonic() > deadline:
            break
    assert unjudged
    assert all(result.trial.target.startswith("shop/") and not result.connected for result in unjudged)
    assert wrong(seen) == []


def test_a_pod_without_a_policy_is_expected_to_answer() -> None:
    """Expectations need no lab."""

    def there(path: str, address: str, node: str) -> dict[str, object]:
        return {**pod(path, 80, node=node), "status": {"phase": "Running", "podIPs": [{"ip": address}]}}

    objects = [namespace("a"), there("a/one", "10.0.0.1", "node1"), there("a/two", "10.0.0.2", "node2")]
    trial = Trial("a/one", "a/two", ip_address("10.0.0.2"), 80, "TCP", Path("/none"))
    assert Expected(objects)(trial) is True
    assert Expected([*objects, policy("a/deny")])(trial) is False
    assert Expected([*objects, policy("a/allow", ingress=[{"from": [{"podSelector": {}}]}])])(trial) is True
