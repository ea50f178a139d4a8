"""A manifest rehearsed on the page: the connections that it is said to end are those that it would end."""

from __future__ import annotations

from ipaddress import ip_address

from agent.cluster.model import Namespace, NetworkPolicy, Node, Pod
from agent.cluster.store import snapshot_of
from agent.ui.live import Live
from agent.ui.manifest import policy_text
from agent.ui.questions import rehearsal
from tests.ui.told import Told, flow

WEB = Pod("default", "web", node="node1", phase="Running", ready=True, ips=(ip_address("10.244.0.2"),))
DENY = policy_text(NetworkPolicy("default", "deny", policy_types=frozenset({"Ingress"})))


def test_no_connection_ends_that_is_over_or_that_a_node_began() -> None:
    to = ("10.244.0.2", 8080, "default/web")
    flows = [
        flow(("203.0.113.1", 4001, ""), to, closed=True),
        flow(("203.0.113.1", 4002, ""), to, closed=False, from_node=False),
        flow(("192.0.2.1", 4003, ""), to, closed=False, from_node=True),
    ]
    answers = {"node1": {"flows": {"flows": flows, "total": len(flows)}}}
    live = Live(Told(snapshot_of((Node("node1"), Namespace("default"), WEB)), answers))
    found = rehearsal(live, {"manifest": DENY})
    live.close()
    assert [cut["reason"] for cut in found["cuts"]] == ["ingress of default/web by default/deny"]
    assert found["cuts_total"] == 1
