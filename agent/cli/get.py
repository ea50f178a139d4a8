"""`podwall get`: what the agents hold, which is what is in force, whatever the API server says.

    each node's agent --held, page by page--> items --one row an object--> table, or json and yaml, whole

What every node has (Services, policies, Nodes) becomes one item with what each node says of it; what is one
node's (Pods, addresses) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from agent.cli.agents import NOBODY, Agents, Silent
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, live_cluster_options
from agent.cli.get_tables import TABLES, Item
from agent.cli.names import Takes, completes
from agent.cli.output import NEGATIVE, Coloured, output_option, show
from agent.log import printable

MOST_PAGES = 200
NAMES = {
    "pods": ("pod", "po"),
    "services": ("service", "svc"),
    "policies": ("policy", "networkpolicies", "networkpolicy", "netpol"),
    "nodes": ("node", "no"),
    "addresses": ("address", "ip", "ips"),
}
"""What can be got, and its other names, kubectl's among them."""

NAMESPACED = {"pods", "services", "policies"}


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


OBJECTS = {"pods": ("Pod",), "services": ("Service",), "policies": ("NetworkPolicy",), "nodes": ("Node",)}


def _of_resource(ctx: click.Context) -> Takes:
    return Takes(OBJECTS.get(ctx.params.get("resource") or "", ()), spaces=False)


@click.command("get")
@click.argument("resource", type=Resource(), metavar="RESOURCE")
@click.argument("name", default="", shell_complete=completes(_of_resource))
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces.")
@output_option
@live_cluster_options
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
        return "; ".join(sorted(set(self.silent.values()))) or NOBODY

    def gaps(self) -> Iterator[Coloured]:
        """What is not in the answer, for a person."""
        for node, why in sorted(self.silent.items()):
            yield Coloured(f"{node} is missing here: {why}", "red")
        for node in self.cut:
            yield Coloured(f"{node} holds more than is listed here: give a namespace or a name", "yellow")


def collected(agents: Agents, what: str, namespace: str, name: str) -> Held:
    """Ask all agents at the same time, each page by page."""
    asked = {"what": what, "namespace": namespace, "name": name if what in NAMESPACED else ""}

    def whole(node: str) -> tuple[list[Item], bool]:
        items: list[Item] = []
        after: Sequence[str] | None = []
        for _ in range(MOST_PAGES):
            page = agents.ask(node, "held", {**asked, "after": after})
            items += page["items"]
            after = page["next"]
            if after is None:
                return items, False
        return items, True

    answers = agents.each(whole)
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
