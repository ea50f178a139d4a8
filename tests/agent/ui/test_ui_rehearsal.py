"""A manifest rehearsed on the page: what it does and ends, and what there is to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import pytest
import yaml

from agent.cluster.model import Namespace, NetworkPolicy, Node, Owner, Pod
from agent.cluster.store import snapshot_of
from agent.ui.live import Live
from agent.ui.manifest import policy_text
from agent.ui.questions import CannotBeAnsweredError, rehearsal
from tests.agent.compile.worlds import decoded, policy
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


FRONT = Pod(
    "shop",
    "front-0",
    labels={"app": "front"},
    node="node1",
    phase="Running",
    ready=True,
    ips=(ip_address("10.244.0.3"),),
    owners=(Owner("StatefulSet", "front", controller=True),),
)
TO_WEB = decoded(
    policy(
        "default/from-front",
        ingress=[{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "front"}}}]}],
    )
)
CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}}


def stateful_set(name: str, app: str) -> dict[str, Any]:
    template = {"metadata": {"labels": {"app": app}}, "spec": {"containers": [{"name": "main"}]}}
    meta = {"name": name}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": {"template": template}}


def asked(*manifests: Mapping[str, Any], namespace: str = "shop") -> Mapping[str, Any]:
    """What the page says of a change where the front, and nobody else, may reach the web."""
    objects = (Node("node1"), Namespace("default"), Namespace("shop"), WEB, FRONT, TO_WEB)
    live = Live(Told(snapshot_of(objects), {"node1": {}}, namespace=namespace))
    try:
        return rehearsal(live, {"manifest": yaml.safe_dump_all(manifests)})
    finally:
        live.close()


def test_a_workload_whose_template_has_other_labels_rolls_out() -> None:
    found = asked(stateful_set("front", "back"))
    assert found["changed"] == ["Pod shop/front-0"]
    ends = [
        (row["change"], row["sources"][0]["ids"], row["targets"][0]["ids"], row["ports"])
        for row in found["rows"]
    ]
    assert ends == [("closes", ["pod/shop/front-0"], ["pod/default/web"], "every port")]
    assert found["notes"] == [
        "StatefulSet shop/front rolls out: its Pods are replaced, and their connections end"
    ]


def test_what_says_no_namespace_is_of_the_one_that_was_asked() -> None:
    nameless = policy("x/deny")
    del nameless["metadata"]["namespace"]
    assert asked(nameless)["changed"] == ["NetworkPolicy shop/deny"]
    assert asked(nameless, namespace="default")["changed"] == ["NetworkPolicy default/deny"]


def test_what_is_not_looked_at_or_not_there_is_said() -> None:
    found = asked(CONFIG_MAP, policy("gone/deny"))
    assert found["notes"] == [
        "the manifest, document 1 (line 1): ConfigMap is not looked at",
        "namespace gone is not there: apply would fail",
    ]
    assert not [each for each in found["sentences"] if "Namespace gone" in each]


@pytest.mark.parametrize("kind", ["ConfigMap", "Endpoints"])
def test_a_manifest_of_other_kinds_alone_is_refused(kind: str) -> None:
    with pytest.raises(CannotBeAnsweredError, match="there is no NetworkPolicy, "):
        asked({**CONFIG_MAP, "kind": kind})
