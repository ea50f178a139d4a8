"""From what the kernel has to what the plan wants: the steps, in an order in which no packet loses its way.

    device -> own unreachable range -> neighbours and forwarding entries -> routes -> what is over, in reverse

A route is replaced in place, never deleted and added again, so a flow that changes from direct to vxlan loses
nothing. A destination that a foreign route (another rtm_protocol) has in the same table is left to it and
reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from agent.cluster.model import IPNetwork
from agent.routes.plan import VXLAN_DEVICE, Forwarding, Neighbour, Plan, Route, Vxlan

Item: TypeAlias = Vxlan | Route | Neighbour | Forwarding


@dataclass(frozen=True, slots=True)
class Present:
    """What is in the kernel: podwall's own entries, and foreign routes as `ip route` shows them."""

    routes: frozenset[Route] = frozenset()
    foreign: Mapping[IPNetwork, str] = field(default_factory=dict)
    vxlan: Vxlan | None = None
    neighbours: frozenset[Neighbour] = frozenset()
    forwarding: frozenset[Forwarding] = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """One change: `create` fails where something is, `replace` and `change` keep it in use meanwhile."""

    action: Literal["create", "replace", "change", "delete"]
    item: Item

    def __str__(self) -> str:
        return f"{self.action} {self.item}"


def steps(plan: Plan, present: Present) -> tuple[Step, ...]:
    """The changes that make the kernel as planned, in order; none when it is."""
    device, present = _device(plan.vxlan, present)
    gone = [Step("delete", present.vxlan)] if present.vxlan and not plan.vxlan else []
    entries = _entries(plan, present)
    return (
        *device,
        *(step for step in entries if step.action != "delete"),
        *_wanted_routes(plan, present),
        *_stale_routes(plan, present),
        *(step for step in entries if step.action == "delete" and not gone),
        *gone,
    )


def conflicts(plan: Plan, present: Present) -> tuple[str, ...]:
    """The planned routes that a foreign route keeps out, each with the remedy."""
    return tuple(
        f"route {route} is kept out by a foreign one: {present.foreign[route.destination]}; "
        f"remove it, or give the Node another range"
        for route in sorted(plan.routes, key=str)
        if route.destination in present.foreign
    )


def _device(wanted: Vxlan | None, present: Present) -> tuple[list[Step], Present]:
    if wanted is None or wanted == present.vxlan:
        return [], present
    if present.vxlan is None:
        return [Step("create", wanted)], present
    if _identity(wanted) == _identity(present.vxlan):
        return [Step("change", wanted)], present
    # The kernel cannot change these on a live device. All that depends on it goes with it.
    emptied = Present(
        routes=frozenset(route for route in present.routes if route.device != VXLAN_DEVICE),
        foreign=present.foreign,
    )
    return [Step("delete", present.vxlan), Step("create", wanted)], emptied


def _identity(vxlan: Vxlan) -> tuple[object, ...]:
    return (vxlan.vxlan_id, vxlan.port, vxlan.local, vxlan.mac)


def _entries(plan: Plan, present: Present) -> list[Step]:
    neighbours = _keyed(
        {item.address: item for item in plan.neighbours}, {item.address: item for item in present.neighbours}
    )
    forwarding = _keyed(
        {item.mac: item for item in plan.forwarding}, {item.mac: item for item in present.forwarding}
    )
    return [*forwarding, *neighbours]


def _keyed(wanted: Mapping[object, Item], present: Mapping[object, Item]) -> Iterator[Step]:
    for key in sorted(wanted, key=str):
        if wanted[key] != present.get(key):
            yield Step("replace", wanted[key])
    for key in sorted(present.keys() - wanted.keys(), key=str):
        yield Step("delete", present[key])


def _wanted_routes(plan: Plan, present: Present) -> Iterator[Step]:
    taken = {route.destination for route in present.routes}
    for route in _unreachable_first(plan.routes - present.routes):
        if route.destination not in present.foreign:
            yield Step("replace" if route.destination in taken else "create", route)


def _stale_routes(plan: Plan, present: Present) -> Iterator[Step]:
    wanted = {route.destination for route in plan.routes}
    for route in sorted(present.routes, key=str):
        if route.destination not in wanted:
            yield Step("delete", route)


def _unreachable_first(routes: Iterable[Route]) -> list[Route]:
    return sorted(routes, key=lambda route: (route.gateway is not None, str(route)))
