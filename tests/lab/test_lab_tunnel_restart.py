"""An agent that comes back leaves the rules of its tunnel alone: they are never gone for a moment."""

from __future__ import annotations

import re

from lab.world import Lab
from tests.lab.policies import namespace, pod

HANDLE = re.compile(r"chain (tunnel_\w+|to_node_behind_tunnel) \{ # handle (\d+)")
RESTARTS = 5


def handles(lab: Lab) -> dict[str, str]:
    """The kernel's handles of the tunnel's chains: a chain that is made anew has another."""
    listed = lab.run("node1", ["nft", "-a", "list", "table", "inet", "podwall"]).stdout
    return dict(HANDLE.findall(listed))


def test_the_tunnels_rules_outlive_restarts() -> None:
    with Lab(nodes=2, mode="vxlan", given=[namespace("space"), pod("space/one", node="node1")]) as lab:
        before = handles(lab)
        assert set(before) == {"tunnel_input", "tunnel_forward", "to_node_behind_tunnel"}
        for kill in [True, False] * RESTARTS:
            lab.agents["node1"].stop(kill=kill)
            lab.agents["node1"].start()
            lab.wait_until_ready()
            assert handles(lab) == before
