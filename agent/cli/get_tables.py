"""The tables of `podwall get`: one row an object, and below them what is wrong with some. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from agent.cli.output import Coloured, Column, age, table

ENDLESS = 1 << 20
"""A range of so many addresses is never used up, and its size tells nobody anything."""

Item: TypeAlias = Mapping[str, Any]
Lines: TypeAlias = Iterator[str | Coloured]

_NAMESPACE: Column[Item] = Column("NAMESPACE", lambda of: of["namespace"])
_NAME: Column[Item] = Column("NAME", lambda of: of["name"])


def _table(content: Item, columns: Sequence[Column[Item]], wide: bool, everywhere: bool) -> Iterator[str]:
    first = (_NAMESPACE, _NAME) if everywhere else (_NAME,)
    if content["items"]:
        yield from table(content["items"], (*first, *columns), wide=wide)
    else:
        yield f"the agents hold no {content['kind']} here"


def _pod_table(content: Item, wide: bool, everywhere: bool) -> Lines:
    def policies(of: Item) -> list[str]:
        return sorted({name.partition("/")[2] for names in of["policies"].values() for name in names})

    def audited(of: Item) -> list[str]:
        names = {name.partition("/")[2] for names in of["audited"].values() for name in names}
        return sorted(names - set(policies(of)))

    yield from _table(
        content,
        (
            Column("NODE", lambda of: of["node"]),
            Column("ADDRESSES", lambda of: of["addresses"]),
            Column("INGRESS", lambda of: _isolation(of, "ingress")),
            Column("EGRESS", lambda of: _isolation(of, "egress")),
            Column("POLICIES", policies),
            Column("AUDITED", audited, wide=True),
            Column("STATE", lambda of: of["state"], wide=True),
            Column("LINK", lambda of: of["link"], wide=True),
            Column("MTU", lambda of: of["mtu"], wide=True),
            Column("HOST PORTS", _host_ports, wide=True),
        ),
        wide,
        everywhere,
    )


def _isolation(of: Item, direction: str) -> str:
    return "isolated" if of["isolated"][direction] else "open"


def _host_ports(of: Item) -> list[str]:
    return [f"{each['host_port']}->{each['port']}/{each['protocol']}" for each in of["host_ports"]]


def _service_table(content: Item, wide: bool, everywhere: bool) -> Lines:
    yield from _table(
        content,
        (
            Column("TYPE", lambda of: of["type"]),
            Column("CLUSTER-IP", lambda of: of["cluster_ips"] or of["external_name"]),
            Column("EXTERNAL", lambda of: [*of["load_balancer"], *of["external_ips"]]),
            Column("PORTS", _ports),
            Column("ENDPOINTS", _endpoint_counts),
            Column("STATE", service_state),
            Column("IN FORCE", lambda of: list(_backends(of)), wide=True),
        ),
        wide,
        everywhere,
    )
    for of in content["items"]:
        problems = {text for each in of["nodes"].values() for text in each["problems"]}
        for text in sorted(problems):
            yield Coloured(f"Service {of['namespace']}/{of['name']}: {text}", "yellow")


def service_state(of: Item) -> str:
    """What the nodes do for a Service, in a word where they all do the same."""
    states: dict[str, list[str]] = {}
    for node, each in of["nodes"].items():
        states.setdefault(each["state"], []).append(node)
    if states.keys() == {"served"} and not any(True for _ in _backends(of)):
        return "no endpoints"
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{state} on {','.join(nodes)}" for state, nodes in sorted(states.items()))


def _ports(of: Item) -> list[str]:
    return [
        f"{each['port']}{':' + str(each['node_port']) if each['node_port'] else ''}/{each['protocol']}"
        for each in of["ports"]
    ]


def _endpoint_counts(of: Item) -> str:
    """How many endpoints a port has: of the first port and family; where nodes differ, from and to."""
    counts = set()
    for each in of["nodes"].values():
        lists = [list_ for list_ in each["endpoints"] if list_["reach"] == "cluster"] or each["endpoints"]
        if lists:
            counts.add(lists[0]["total"])
    if not counts:
        return ""
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"


def _backends(of: Item) -> Iterator[str]:
    """Every endpoint that some node leads to, once."""
    seen: dict[str, None] = {}
    for each in of["nodes"].values():
        for list_ in each["endpoints"]:
            for to in list_["endpoints"]:
                address = f"[{to['address']}]" if ":" in to["address"] else to["address"]
                seen[f"{address}:{to['port']}"] = None
    yield from seen


def _policy_table(content: Item, wide: bool, everywhere: bool) -> Lines:
    yield from _table(
        content,
        (
            Column("TYPES", lambda of: of["types"]),
            Column("MODE", lambda of: of["mode"]),
            Column("PODS", lambda of: of["pods"]),
            Column("IN FORCE", policy_nodes),
            Column("GENERATION", lambda of: of["generation"] or ""),
            Column("SINCE", lambda of: age(of["since"]) if of["since"] else ""),
            Column("NODES", lambda of: of["in_force_on"], wide=True),
        ),
        wide,
        everywhere,
    )
    for of in content["items"]:
        for node in of["waiting_on"]:
            has = of["nodes"][node]["in_force"]
            has = "none of it yet" if has is None else f"generation {has}"
            yield Coloured(
                f"NetworkPolicy {of['namespace']}/{of['name']}: {node} has {has}, not {of['generation']}",
                "red",
            )
        for text in of["problems"]:
            yield Coloured(f"NetworkPolicy {of['namespace']}/{of['name']}: {text}", "yellow")


def policy_nodes(of: Item) -> str:
    """On how many nodes a policy is in force, of those that have Pods which it selects."""
    concerned = len(of["in_force_on"]) + len(of["waiting_on"])
    return f"{len(of['in_force_on'])}/{concerned} nodes" if concerned else "selects no Pod"


def _node_table(content: Item, wide: bool, _: bool) -> Lines:
    def agent(field: str) -> Callable[[Item], object]:
        return lambda of: (of["agent"] or {}).get(field)

    yield from _table(
        content,
        (
            Column("AGENT", _agent_state),
            Column("POD CIDRS", lambda of: of["pod_cidrs"]),
            Column("ADDRESSES", lambda of: of["internal_ips"]),
            Column("PODS", agent("pods")),
            Column("REACHED", _ways),
            Column("VERSION", agent("version")),
            Column("NODE READY", lambda of: "yes" if of["ready"] else "no", wide=True),
            Column("SERVICES", agent("services"), wide=True),
            Column("KERNEL", agent("kernel"), wide=True),
            Column("UP", lambda of: age(of["agent"]["started"]) if of["agent"] else "", wide=True),
        ),
        wide,
        False,
    )
    for of in content["items"]:
        for text in (*of["problems"], *((of["agent"] or {}).get("not_ready") or ())):
            yield Coloured(f"Node {of['name']}: {text}", "red")


def _agent_state(of: Item) -> str:
    if of["agent"] is None:
        return "silent"
    return "not ready" if of["agent"]["not_ready"] else "ready"


def _ways(of: Item) -> list[str]:
    """The ways on which other nodes reach its Pods."""
    return sorted({way for paths in of["reached_by"].values() for way in paths.values()})


def _address_table(content: Item, wide: bool, _: bool) -> Lines:
    def size(of: Item) -> str:
        return str(of["size"]) if of["size"] < ENDLESS else "endless"

    use: tuple[Column[Item], ...] = (Column("USED", lambda of: of["used"]), Column("SIZE", size))
    yield from table(
        content["ranges"],
        (
            Column("NODE", lambda of: of["node"]),
            Column("RANGE", lambda of: of["cidr"]),
            *use,
            Column("RESTING", lambda of: of["resting"]),
        ),
    )
    if content["pools"]:
        yield ""
        yield from table(
            content["pools"],
            (Column("POOL", lambda of: of["name"]), Column("FAMILY", lambda of: f"IPv{of['family']}"), *use),
        )
    yield ""
    if not content["items"]:
        yield "no address is in use"
        return
    yield from table(
        content["items"],
        (
            Column("ADDRESS", lambda of: of["address"]),
            Column("NODE", lambda of: of["node"]),
            Column("OWNER", lambda of: f"{of['kind']} {of['owner']}"),
            Column("STATE", lambda of: of["state"]),
        ),
        wide=wide,
    )


TABLES: Mapping[str, Callable[[Item, bool, bool], Lines]] = {
    "pods": _pod_table,
    "services": _service_table,
    "policies": _policy_table,
    "nodes": _node_table,
    "addresses": _address_table,
}
