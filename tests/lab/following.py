"""Waits until every node follows: each agent reads the objects and makes its rules by itself.

What `lab.apply` promises when it returns is less: the objects are in their files, and a Pod's own node has
the Pod's rules. Other nodes look at the files every 50 ms, and may still lead to a Pod that is gone.
"""

from __future__ import annotations

from typing import Any

from agent.cli.ask import ask
from lab import processes
from lab.world import Lab

LIMIT_S = 10.0


def every_node_follows(lab: Lab) -> None:
    """Wait until all agents have read what was written before now and their rules in the kernel say so."""
    for agent in lab.agents.values():
        ask(agent.socket, "lag", {})
    found: dict[str, Any] = {}

    def settled() -> bool:
        found.update({name: ask(agent.socket, "rules", {}) for name, agent in lab.agents.items()})
        return all(of["compared"] and not of["altered"] for of in found.values())

    processes.until(settled, LIMIT_S, lambda: f"the nodes do not follow: {found}")
