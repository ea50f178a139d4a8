"""`podwall get`: what the agents hold, which is what is in force, whatever the API server says.

    each node's agent --held, page by page--> items --one row an object--> table, or json and yaml, whole

What every node has (Services, policies, Nodes) becomes one item with what each node says of it; what is one
node's (Pods, addresses) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import click

from agent.cli.agents import Agents, Silent, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, cluster_options
from agent.cli.output import NEGATIVE, Coloured, Column, age, output_option, show, table
from agent.log import printable

MOST_PAGES = 200
MOST_AT_ONCE = 32
ENDLESS = 1 << 20
"""A range of so many addresses is never used up, and its size tells nobody anything."""

NAMES = {
    "pods": ("pod", "po"),
    "services": ("service", "svc"),
    "policies": ("policy", "networkpolicies", "networkpolicy", "netpol"),
    "nodes": ("node", "no"),
    "addresses": ("address", "ip", "ips"),
}
"""What can be got, and its other names, kubectl's among them."""

NAMESPACED = {"pods", "services", "policies"}

Item = Mapping[str, Any]


class Resource(click.ParamType[str]):
    """One of NAMES, by any of its names."""

    name = "resource"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The resource's own name. Raises click's usage error."""
        for name, others in NAMES.items():
            if str(value).lower() in (name, *others):
                return name
        return self.fail(f"{value!r} is none of {', '.join(NAMES)}", param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem[str]]:
        """The names that begin so."""
        return [click.shell_completion.CompletionItem(name) for name in NAMES if name.startswith(incomplete)]


@click.command("get")
@click.argument("resource", type=Resource(), metavar="RESOURCE")
@click.argument("name", default="")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces.")
@output_option
@cluster_options
def get(asked: Asked, resource: str, name: str, everywhere: bool, output: str) -> None:
    """Show what the agents hold: pods, services, policies, nodes or addresses.

    It is what is in force, not what the API server says: a Pod's isolation is that of its node's rules, a
    Service's endpoints are those that the rules lead to, a policy is listed with the nodes that enforce it.

    \b
    podwall get pods -A                     where each is, its addresses, whether policies isolate it
    podwall get services -o wide            the endpoints in force
    podwall get policies -n shop            on how many nodes each is enforced, and since when
    podwall get addresses                   how full each range is, and who has which address
    podwall get addresses 10.244.1.7        who has this one
    podwall get nodes -o yaml

    The exit status is 1 when NAME is not there, 3 when no agent can be asked.
    """
    if not asked.live:
        raise click.UsageError("manifests have no agents to ask: leave out -f")
    namespace = asked.namespace if resource in NAMESPACED and not everywhere else ""
    with asked.agents() as agents:
        held = collected(agents, resource, namespace, name)
        statuses = agents.ask_all("status") if resource in {"nodes", "addresses"} else {}
    if not held.items:
        raise Unreachable(held.nobody())
    content = CONTENTS[resource](held, statuses, name)
    show(
        output,
        {**content, "silent": held.silent, "cut": held.cut},
        lambda: [*TABLES[resource](content, output == "wide", everywhere), *held.gaps()],
    )
    if name and not content["items"]:
        where = f" in namespace {namespace}" if namespace else ""
        click.echo(printable(f"the agents hold nothing called {name}{where}"), err=True)
        raise SystemExit(NEGATIVE)


# Asking


@dataclass(frozen=True, slots=True)
class Held:
    """What each node's agent holds; why those said nothing that did not; and whose answer was cut."""

    items: Mapping[str, Sequence[Item]]
    silent: Mapping[str, str]
    cut: Sequence[str]

    def all(self) -> list[Item]:
        """Everything, node by node."""
        return [item for node in sorted(self.items) for item in self.items[node]]

    def merged(self, common: Iterable[str]) -> list[dict[str, Any]]:
        """One item an object: what it is, by these fields, and what each node says of it under `nodes`."""
        common = tuple(common)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for node, items in sorted(self.items.items()):
            for item in items:
                key = item.get("namespace", ""), item["name"]
                of = found.setdefault(key, {**{field: item[field] for field in common}, "nodes": {}})
                of["nodes"][node] = {
                    field: value for field, value in item.items() if field not in (*common, "node")
                }
        return [found[key] for key in sorted(found)]

    def nobody(self) -> str:
        """Why nothing at all was said."""
        said = "; ".join(sorted(set(self.silent.values())))
        return said or "there is no podwall agent in the cluster: is podwall installed?"

    def gaps(self) -> Iterator[Coloured]:
        """What is not in the answer, for a person."""
        for node, why in sorted(self.silent.items()):
            yield Coloured(f"{node} is missing here: {why}", "red")
        for node in self.cut:
            yield Coloured(f"{node} holds more than is listed here: give a namespace or a name", "yellow")


def collected(agents: Agents, what: str, namespace: str, name: str) -> Held:
    """Ask all agents at the same time, each page by page."""
    asked = {"what": what, "namespace": namespace, "name": name if what in NAMESPACED else ""}

    def whole(node: str) -> tuple[list[Item], bool] | Silent:
        items: list[Item] = []
        after: Sequence[str] | None = []
        for _ in range(MOST_PAGES):
            try:
                page = agents.ask(node, "held", {**asked, "after": after})
            except SilentError as error:
                return Silent(str(error))
            items += page["items"]
            after = page["next"]
            if after is None:
                return items, False
        return items, True

    nodes = list(agents.nodes)
    with ThreadPoolExecutor(max(1, min(len(nodes), MOST_AT_ONCE))) as threads:
        answers = dict(zip(nodes, threads.map(whole, nodes), strict=True))
    there = {node: each for node, each in answers.items() if not isinstance(each, Silent)}
    return Held(
        items={node: items for node, (items, _) in there.items()},
        silent={node: each.why for node, each in answers.items() if isinstance(each, Silent)},
        cut=[node for node, (_, cut) in there.items() if cut],
    )


# What becomes of it: {"kind": ..., "items": [...]}

Statuses = Mapping[str, Any]


def _pods(held: Held, _: Statuses, name: str) -> dict[str, Any]:
    items = sorted(held.all(), key=lambda of: (of["namespace"], of["name"], of["node"]))
    return {"kind": "pods", "items": [item for item in items if name in ("", item["name"])]}


def _services(held: Held, _: Statuses, name: str) -> dict[str, Any]:
    common = (
        "namespace",
        "name",
        "type",
        "cluster_ips",
        "external_ips",
        "load_balancer",
        "external_name",
        "ports",
    )
    return {"kind": "services", "items": [of for of in held.merged(common) if name in ("", of["name"])]}


def _policies(held: Held, _: Statuses, name: str) -> dict[str, Any]:
    items = []
    for of in held.merged(("namespace", "name")):
        nodes = of["nodes"]
        newest = max(nodes.values(), key=lambda each: each["generation"])
        concerned = {node: each for node, each in nodes.items() if each["pods"]}
        since = [each["since"] for each in concerned.values() if each["since"] is not None]
        enforced = [
            node
            for node, each in concerned.items()
            if not each["waiting"] and each["generation"] == newest["generation"]
        ]
        items.append(
            {
                "namespace": of["namespace"],
                "name": of["name"],
                "types": newest["types"],
                "mode": newest["mode"],
                "generation": newest["generation"],
                "pods": sum(each["pods"] for each in concerned.values()),
                "in_force_on": sorted(enforced),
                "waiting_on": sorted(concerned.keys() - set(enforced)),
                "since": max(since, default=None),
                "problems": newest["problems"],
                "nodes": nodes,
            }
        )
    return {"kind": "policies", "items": [of for of in items if name in ("", of["name"])]}


def _nodes(held: Held, statuses: Statuses, name: str) -> dict[str, Any]:
    items = []
    for of in held.merged(("name", "ready", "internal_ips", "pod_cidrs", "problems")):
        status = statuses.get(of["name"])
        told = None if status is None or isinstance(status, Silent) else status
        items.append(
            {
                **{field: value for field, value in of.items() if field != "nodes"},
                "agent": told
                and {
                    "version": told["version"],
                    "kernel": told["kernel"],
                    "started": told["started"],
                    "not_ready": told["not_ready"],
                    "pods": told["pods"],
                    "services": told["services"]["state"],
                },
                "reached_by": {
                    node: {path["cidr"]: path["way"] for path in each["paths"]}
                    for node, each in of["nodes"].items()
                    if node != of["name"]
                },
            }
        )
    return {"kind": "nodes", "items": [of for of in items if name in ("", of["name"])]}


def _addresses(held: Held, statuses: Statuses, name: str) -> dict[str, Any]:
    told = {node: each for node, each in statuses.items() if not isinstance(each, Silent)}
    pools = {}
    for each in told.values():
        for pool in (each["load_balancer"] or {}).get("pools", ()):
            pools[pool["name"], pool["family"]] = pool
    items = sorted(held.all(), key=lambda of: (of["node"], of["kind"], _in_order(of["address"])))
    return {
        "kind": "addresses",
        "ranges": [{"node": node, **of} for node, each in sorted(told.items()) for of in each["addresses"]],
        "pools": [pools[key] for key in sorted(pools)],
        "items": [of for of in items if name in ("", of["address"], of["owner"])],
    }


def _in_order(address: str) -> tuple[int, int]:
    from ipaddress import ip_address  # noqa: PLC0415 - only this resource needs it

    read = ip_address(address)
    return read.version, int(read)


CONTENTS: Mapping[str, Callable[[Held, Statuses, str], dict[str, Any]]] = {
    "pods": _pods,
    "services": _services,
    "policies": _policies,
    "nodes": _nodes,
    "addresses": _addresses,
}


# Tables

_NAMESPACE: Column[Item] = Column("NAMESPACE", lambda of: of["namespace"])
_NAME: Column[Item] = Column("NAME", lambda of: of["name"])
Lines = Iterator[str | Coloured]


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
