"""Connections that are broken in the lab, each in another way; the first line of `podwall why` names it.

The objects are those of examples/troubleshooting, which a reader can apply to a cluster as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import main
from lab import manifests, names
from lab.probe import CONNECTED, REFUSED, SILENT, UDP
from lab.world import Lab
from tests.lab.services import eventually

BROKEN = Path(__file__).parents[2] / "examples" / "troubleshooting"
GIVEN = (BROKEN, BROKEN / "lab")


@dataclass(frozen=True)
class Case:
    """What is asked, what becomes of the connection itself, and the first line."""

    name: str
    target: str
    seen: str
    sentence: str
    source: str = "broken/client"


CASES = [
    Case(
        "empty endpoints",
        "empty",
        REFUSED,
        "denied: Service broken/empty has no selector, and no EndpointSlice has an address at its port 80",
    ),
    Case(
        "selector mismatch",
        "misspelt",
        REFUSED,
        "denied: no Pod of namespace broken has the labels app=wbe that Service broken/misspelt selects; "
        "the nearest is Pod broken/client with app=client",
    ),
    Case(
        "targetPort by a wrong name",
        "wrong-name",
        REFUSED,
        "denied: Service broken/wrong-name sends port 80 to targetPort 'https', "
        "a name that no container of its Pods declares (they declare http 8080)",
    ),
    Case(
        "targetPort by a wrong number",
        "wrong-number",
        REFUSED,
        "doubtful: Service broken/wrong-number sends port 80 to targetPort 8081, which no container of its "
        "Pods declares (they declare http 8080): unless something listens there unsaid, the Pod refuses",
    ),
    Case(
        "ingress denied",
        "guarded",
        SILENT,
        "denied: ingress policy broken/friends-only of Pod broken/guarded does not let Pod broken/client in "
        "on TCP 8080: its podSelector asks for app=friend, but Pod broken/client has app=client",
    ),
    Case(
        "egress denied",
        "for-all",
        SILENT,
        "denied: egress policy broken/database-only of Pod broken/prisoner does not let it out to "
        "Pod broken/web on TCP 8080: its podSelector asks for app=db, but Pod broken/web has app=web",
        source="broken/prisoner",
    ),
    Case(
        "wrong namespace label",
        "for-team",
        SILENT,
        "denied: ingress policy broken/team-only of Pod broken/for-team does not let Pod "
        "broken-clients/client in on TCP 8080: its namespaceSelector asks for team=web, but namespace "
        "broken-clients has team=frontend",
        source="broken-clients/client",
    ),
    Case(
        "policy in the wrong namespace",
        "lost",
        SILENT,
        "denied: ingress policy broken/nobody-in of Pod broken/lost does not let Pod broken/client in on "
        "TCP 8080; broken-clients/client-in would, but it stands in namespace broken-clients, where it "
        "selects no Pod, not in broken",
    ),
    Case(
        "port name unknown",
        "unnamed",
        SILENT,
        "denied: ingress policy broken/metrics-only of Pod broken/unnamed does not let Pod broken/client in "
        "on TCP 8080: its port 'metrics' is a name that no container of Pod broken/unnamed declares",
    ),
]


@pytest.fixture(scope="module")
def broken() -> Iterator[Lab]:
    with Lab(nodes=2, given=manifests.read(GIVEN)) as made:
        yield made


def why(*arguments: str) -> Any:
    """The answer, once the nodes' rules have followed what was applied last."""

    def ask() -> Any:
        done = CliRunner().invoke(main, ["why", "--lab", "-n", "broken", "-o", "json", *arguments])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    return eventually(ask, lambda answer: all(each["agrees"] for each in answer["nodes"]))


def comes_to(wanted: str, lab: Lab, source: str, *to: Any) -> bool:
    """Whether a connection to an address and port ends like this, once the nodes' rules have followed."""
    return eventually(lambda: lab.connect(source, *to), wanted.__eq__) == wanted


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_first_line_names_what_is_wrong(broken: Lab, case: Case) -> None:
    address = broken.service(f"broken/{case.target}").address(4)

    assert comes_to(case.seen, broken, case.source, address, 80)
    answer = why(case.source, f"svc/{case.target}:80")
    assert (answer["allowed"], answer["sentence"]) == (False, case.sentence)
    assert answer["nodes"], "nobody compared it with the rules"
    assert [each["differs"] for each in answer["nodes"]] == [[] for _ in answer["nodes"]]


def test_a_name_that_a_policy_lets_nobody_look_up(broken: Lab) -> None:
    """By its address the Service answers; its name is never told."""
    dns = broken.service("kube-system/kube-dns").address(4)

    assert comes_to(CONNECTED, broken, "broken/nameless", broken.service("broken/for-all").address(4), 80)
    assert comes_to(SILENT, broken, "broken/nameless", dns, 53, UDP)
    assert comes_to(CONNECTED, broken, "broken/client", dns, 53, UDP)
    answer = why("nameless", "for-all.broken.svc.cluster.local:80")
    assert (answer["allowed"], answer["cause"]) == (False, "dns-denied")
    assert answer["sentence"] == (
        "denied: Pod broken/nameless may not ask the cluster's DNS for the address of Service "
        "broken/for-all: egress policy broken/forgot-dns of Pod broken/nameless does not let it out to "
        "Pod kube-system/dns on UDP 53"
    )


def test_a_node_port_closed_by_its_traffic_policy(broken: Lab) -> None:
    there = broken.pod("broken/web").node
    other = next(node for node in broken.nodes if node.name != there)
    port = broken.service("broken/local-only").node_port
    outside = str(names.outside().addresses[0])

    assert comes_to(CONNECTED, broken, "outside", broken.node(there).addresses[0], port)
    assert comes_to(SILENT, broken, "outside", other.addresses[0], port)
    assert why(outside, f"node/{there}:{port}")["allowed"]
    answer = why(outside, f"node/{other.name}:{port}")
    assert (answer["allowed"], answer["sentence"]) == (
        False,
        f"denied: Service broken/local-only has externalTrafficPolicy: Local and no ready endpoint on "
        f"{other.name}; 1 on other nodes do not count",
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("broken/client", "guarded"),
        ("broken/prisoner", "for-all"),
        ("broken-clients/client", "for-team"),
        ("broken/client", "lost"),
        ("broken/client", "unnamed"),
    ],
)
def test_the_change_it_offers_opens_the_way(broken: Lab, source: str, target: str) -> None:
    address = broken.service(f"broken/{target}").address(4)
    changes = why(source, f"svc/{target}:80")["changes"]
    policies = {key.name: item for key, item in broken.objects().items() if key.kind == "NetworkPolicy"}
    before = [policies[change["policy"].partition("/")[2]] for change in changes]
    try:
        broken.apply([changed(policies[change["policy"].partition("/")[2]], change) for change in changes])

        assert why(source, f"svc/{target}:80")["allowed"]
        assert comes_to(CONNECTED, broken, source, address, 80)
    finally:
        broken.apply(before)


def changed(policy: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The policy with what is to be added, its last part at the end of a list."""
    made = json.loads(json.dumps(policy))
    at = made
    for part in change["path"][:-1]:
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = []
        at = at[part]
    at.append(change["add"])
    return made


def test_a_denial_can_be_the_exit_status(broken: Lab) -> None:
    arguments = ["why", "--lab", "-n", "broken", "client", "svc/empty:80"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert CliRunner().invoke(main, [*arguments, "--exit-code"]).exit_code == 1
