"""Rules that somebody altered, so that the agent cannot mend them: `podwall why` says what they do otherwise.

The agent repairs a foreign change at once. Here the table belongs to somebody else: with nftables' flag
`owner` the kernel lets nobody but the socket that made it change a table, as long as that socket is open.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.completion import candidates
from agent.cli.main import main
from lab import netns
from lab.probe import CONNECTED, SILENT
from lab.world import Lab
from tests.lab.following import every_node_follows
from tests.lab.policies import namespace, pod, policy, replica
from tests.lab.services import eventually, service

KEEP = """
import sys, nftables
nft = nftables.Nftables()
code, _, error = nft.cmd(sys.stdin.readline().replace("\\0", "\\n"))
print(error if code else "held", flush=True)
sys.stdin.read()
"""
OBJECTS = [
    namespace("shop"),
    pod("shop/client", node="node1", labels={"app": "client"}),
    pod("shop/web", 8080, node="node2", labels={"app": "web"}),
    pod("shop/other", 8080, node="node2", labels={"app": "web"}),
    pod("shop/shut", 8080, node="node2", labels={"app": "shut"}),
    service("shop/web", {"app": "web"}),
    service("shop/public", {"app": "web"}, type="LoadBalancer"),
    policy("shop/shut", podSelector={"matchLabels": {"app": "shut"}}),
    replica("shop/crew-5f7-a", 8080, node="node1", labels={"app": "crew"}),
    replica("shop/crew-5f7-b", 8080, node="node2", labels={"app": "crew", "muted": "yes"}),
    policy("shop/muted", podSelector={"matchLabels": {"muted": "yes"}}, policyTypes=["Egress", "Ingress"]),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, given=OBJECTS) as made:
        every_node_follows(made)
        yield made


def why(*words: str) -> Any:
    done = CliRunner().invoke(main, ["why", "--lab", "-n", "shop", "-o", "json", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@contextmanager
def altered(lab: Lab, node: str, table: str, rule: str) -> Iterator[None]:
    """A node's table with one more rule before all others of a chain, which its agent must leave as it is."""
    listed = lab.run(node, ["nft", "list", "table", "inet", table]).stdout
    owned = listed.replace(f"table inet {table} {{", f"table inet {table} {{ flags owner;", 1)
    text = f"delete table inet {table}\n{owned}\ninsert rule inet {table} {rule}"
    holder = netns.run(
        lab.netns(node),
        subprocess.Popen,
        [sys.executable, "-c", KEEP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        holder.stdin.write(text.replace("\n", "\0") + "\n")
        holder.stdin.flush()
        assert holder.stdout.readline().strip() == "held"
        yield
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()
        lab.wait_until_ready()


def mended() -> bool:
    """Whether the nodes' rules are the agents' again: what is denied is denied, too."""
    answers = [why("client", target) for target in ("pod/web:8080", "svc/web:80", "pod/shut:8080")]
    return all(each["agrees"] for answer in answers for each in answer["nodes"])


def test_the_rules_of_all_nodes_on_the_way_are_compared(lab: Lab) -> None:
    answer = eventually(lambda: why("client", "pod/web:8080"), lambda of: of["allowed"])

    assert [(each["node"], each["agrees"]) for each in answer["nodes"]] == [("node1", True), ("node2", True)]


@pytest.mark.parametrize(("source", "target"), [("deploy/crew", "pod/web:8080"), ("client", "crew:8080")])
def test_the_pods_of_a_deployment_that_differ(lab: Lab, source: str, target: str) -> None:
    """Real packets do what is said of each pair; the answer, and what the nodes do, is the denied one's."""
    answer = eventually(lambda: why(source, target), lambda of: all(each["agrees"] for each in of["nodes"]))

    pairs = answer["pairs"]
    assert (answer["allowed"], pairs["total"], pairs["allowed"], pairs["alike"]) == (False, 2, 1, False)
    assert pairs["text"] == "allowed for 1 of the 2 Pods of Deployment shop/crew: crew-5f7-a"
    assert "shop/crew-5f7-b" in answer["sentence"]
    assert answer["nodes"]
    assert all(each["agrees"] for each in answer["nodes"])
    for each in pairs["each"]:
        here, there = (each[end].removeprefix("Pod ") for end in ("source", "target"))
        seen = lab.connect(here, lab.pod(there).address(4), 8080)
        assert seen == (CONNECTED if each["allowed"] else SILENT), each


def test_a_load_balancers_address_is_asked_at_the_node_that_answers_for_it(lab: Lab) -> None:
    """Its status is written by the agents, and so is who answers: neither stands in a manifest."""
    outside = str(lab.outside.addresses[0])
    public = eventually(lambda: lab.service("shop/public"), lambda of: bool(of.balanced_addresses))
    address = public.balanced_address(4)
    assert eventually(lambda: lab.connect("outside", address, 80), CONNECTED.__eq__) == CONNECTED

    def well(of: Any) -> bool:
        return bool(of["allowed"] and of["nodes"] and all(each["agrees"] for each in of["nodes"]))

    for target in (f"{address}:80", "svc/public:80"):
        answer = eventually(lambda: why(outside, target), well)  # noqa: B023
        assert answer["allowed"], answer["sentence"]
        assert well(answer)
        assert "LoadBalancer port 80" in answer["steps"][1]["text"]
    answerer = why(outside, f"{address}:80")["nodes"][0]["node"]
    neighbours = lab.run("outside", ["ip", "neighbour", "show", str(address)]).stdout
    link = json.loads(lab.run(answerer, ["ip", "-json", "link", "show", "eth0"]).stdout)[0]
    assert link["address"] in neighbours


def test_a_rule_that_drops_what_policies_allow(lab: Lab) -> None:
    target = lab.pod("shop/web").address(4)
    with altered(lab, "node2", "podwall", f"policy_forward ip daddr {target} counter drop"):
        assert lab.connect("shop/client", target, 8080) == SILENT
        answer = why("client", "pod/web:8080")

    assert (answer["allowed"], answer["cause"]) == (False, "rules-differ")
    assert answer["sentence"].startswith(
        "denied: the rules on node2 differ from what the policies and Services say: they drop it in inet "
        f"podwall policy_forward, rule 1, though it may reach {target}:8080"
    )
    assert [(each["node"], each["agrees"]) for each in answer["nodes"]] == [("node1", True), ("node2", False)]
    assert eventually(mended, bool)
    assert lab.connect("shop/client", target, 8080) == CONNECTED


def test_a_rule_that_lets_pass_what_policies_deny(lab: Lab) -> None:
    target = lab.pod("shop/shut").address(4)
    assert lab.connect("shop/client", target, 8080) == SILENT
    with altered(lab, "node2", "podwall", f"policy_forward ip daddr {target} accept"):
        assert lab.connect("shop/client", target, 8080) == CONNECTED
        answer = why("client", "pod/shut:8080")

    assert answer["cause"] == "rules-differ"
    assert f"they let it pass to {target}:8080, though the policies deny it" in answer["sentence"]
    assert eventually(mended, bool)


def test_a_rule_that_leads_a_service_elsewhere(lab: Lab) -> None:
    address, there = lab.service("shop/web").address(4), lab.pod("shop/shut").address(4)
    rule = f"prerouting_ipv4 ip daddr {address} tcp dport 80 dnat ip to {there}:8080"
    with altered(lab, "node1", "podwall_services", rule):
        answer = why("client", "svc/web:80")

    assert answer["cause"] == "rules-differ"
    assert f"they lead it to {there}:8080, which it must not reach" in answer["sentence"]
    assert eventually(mended, bool)


def test_an_agent_that_is_silent_is_told_apart(lab: Lab) -> None:
    """What the objects say is still an answer; nobody says that it is also what the rules do."""
    agent = lab.agents["node2"]
    agent.stop(kill=True)
    try:
        answer = why("client", "pod/web:8080")
    finally:
        agent.start()
        lab.wait_until_ready()

    assert answer["allowed"]
    assert [(each["node"], each["agrees"]) for each in answer["nodes"]] == [("node1", True), ("node2", None)]
    assert "does not answer" in answer["nodes"][1]["silent"]


@pytest.mark.usefixtures("lab")
def test_tab_offers_the_labs_names() -> None:
    def offered(*words: str) -> list[str]:
        return [line.split("\t")[0] for line in candidates(words) if not line.startswith(":")]

    why_in_shop = ("why", "--lab", "-n", "shop")
    assert offered(*why_in_shop, "svc/") == ["svc/public", "svc/web", "svc/default/", "svc/kube-system/"]
    assert offered(*why_in_shop, "crew-") == ["crew-5f7-a", "crew-5f7-b"]
    assert offered(*why_in_shop, "client", "svc/web:8") == ["svc/web:80"]
    assert offered("flows", "--lab", "--node", "") == ["node1", "node2"]
    assert offered("plan", "--lab", "-n", "shop", "--delete", "netpol/m") == ["netpol/muted"]
    assert offered("lab", "exec", "shop/c") == ["shop/client", "shop/crew-5f7-a", "shop/crew-5f7-b"]
    assert offered("lab", "exec", "o") == ["outside"]
