"""What a node's agent answers about policies, denied packets and flows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from agent.cli.ask import ask
from lab.world import Lab
from tests.lab.policies import LIMIT, namespace, pod, policy
from tests.lab.services import until

API = {"matchLabels": {"app": "api"}}
OBJECTS = (
    namespace("shop"),
    pod("shop/api-1", 8080, node="node1", labels={"app": "api"}),
    pod("shop/api-2", 8080, node="node1", labels={"app": "api"}),
    pod("shop/web", 8080, node="node2", labels={"app": "web"}),
)
ALLOWING = policy("shop/api", podSelector=API, ingress=[{"ports": [{"port": 8080}]}])
DENYING = policy("shop/api", podSelector=API)


@contextmanager
def shop() -> Iterator[Lab]:
    with Lab(nodes=2, given=[*OBJECTS, ALLOWING]) as lab:
        yield lab


def asked(lab: Lab, node: str, what: str) -> dict[str, Any]:
    path = lab.node(node).directory / "agent.sock"
    return cast("dict[str, Any]", ask(path, what, {}))


def flow_ends(lab: Lab) -> list[tuple[str, str]]:
    flows = asked(lab, "node1", "flows")["flows"]
    return [(flow["source"]["pod"], flow["destination"]["pod"]) for flow in flows]


def test_policies_denials_and_flows() -> None:
    with shop() as lab:
        (before,) = asked(lab, "node1", "policies")["policies"]
        assert (before["namespace"], before["name"], before["pods"]) == ("shop", "api", 2)
        assert before["in_force"] == before["generation"]
        assert asked(lab, "node2", "policies")["policies"] == [], "it selects no Pod there"

        address = str(lab.pod("shop/api-1").address(4))
        assert lab.connect("shop/web", address, 8080) == "connected"
        # web's address comes with its status
        until(lambda: ("shop/web", "shop/api-1") in flow_ends(lab), LIMIT)

        changed = time.time()
        lab.apply([*OBJECTS, DENYING])
        (after,) = until(
            lambda: [p for p in asked(lab, "node1", "policies")["policies"] if p["since"] > before["since"]],
            LIMIT,
        )
        assert changed <= after["since"] <= time.time()
        assert lab.connect("shop/web", address, 8080) == "silent"
        denied = until(lambda: asked(lab, "node1", "denials")["denials"], LIMIT)
        assert (denied[0]["pod"], denied[0]["peer"], denied[0]["dport"]) == ("shop/api-1", "shop/web", 8080)
