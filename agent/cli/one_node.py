"""What one node's agent says of itself, over its socket on this machine: lines for a person. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent.cli.output import age


def lines(state: dict[str, Any]) -> Iterator[str]:
    """The status of one agent."""
    yield f"Node {state['node']}: {'not ready' if state['not_ready'] else 'ready'}"
    yield from (f"  not ready: {reason}" for reason in state["not_ready"])
    yield from (f"  problem: {problem}" for problem in state["problems"])
    for each in state.get("object_problems", ()):
        yield f"  {each['kind']} {each['object']}: {each['problem']}"
    if (left := state.get("object_problems_total", 0) - len(state.get("object_problems", ()))) > 0:
        yield f"  and {left} more problems of objects"
    yield f"  podwall {state['version']}, kernel {state['kernel']}, up {age(state['started'])}"
    yield f"  Pods: {state['pods']}"
    for each in state["addresses"]:
        yield f"  {each['cidr']}: {each['used']} of {each['size']} in use, {each['resting']} rest"
    for path in state["paths"]:
        yield f"  to {path['cidr']} on {path['node']}: {path['way']}"
    yield from _services(state.get("services"))
    yield from _load_balancer(state.get("load_balancer"))
    yield f"  commits: {state['commits']}, last {age(state['last_commit'])} ago"


def _services(state: dict[str, Any] | None) -> Iterator[str]:
    if state is None:
        return
    yield f"  Services: {state['state']} ({state['why']}), {state['services']} in the cluster"
    for service, problems in state["problems"].items():
        yield from (f"  Service {service}: {problem}" for problem in problems)


def _load_balancer(state: dict[str, Any] | None) -> Iterator[str]:
    if state is None:
        return
    for pool in state["pools"]:
        yield f"  pool {pool['name']}, IPv{pool['family']}: {pool['used']} of {pool['size']} in use"
    if state["silent_because"]:
        yield f"  answers for no LoadBalancer address: {state['silent_because']}"
    elif state["announced"]:
        yield f"  answers for {', '.join(state['announced'])}"
