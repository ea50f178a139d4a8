"""What one cluster's policies become, as a reviewer reads it; UPDATE_GOLDEN=1 writes it."""

from __future__ import annotations

import os
from pathlib import Path

from agent.compile import links
from agent.nft import render
from agent.nft.model import Ruleset
from tests.agent.compile.test_policy import CASES, CLUSTER
from tests.agent.compile.worlds import World

GOLDEN = Path(__file__).parent / "golden" / "policies.nft"
CASE = "an API behind a controller, with metrics, a database and DNS"


def test_an_api_behind_a_controller() -> None:
    """One policy, ingress and egress, for one Pod of this node; what links need is in links.nft."""
    world, others = World(*CLUSTER, *CASES[CASE][0]), Ruleset(links.static())
    of_policies = [
        item for item in world.ruleset.items() if others.get(item.id) is None or item.id in others.tables
    ]
    text = render.ruleset(Ruleset(of_policies)).partition("table inet")

    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text("".join(text[1:]))
    assert "".join(text[1:]) == GOLDEN.read_text()
