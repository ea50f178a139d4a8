"""New TCP connections per second through a Service's ClusterIP, by who serves it and among how many Services.

    client Pod --SYN to 10.96.x.y:80--> node: translated to one of two --> server Pods on the same node

podwall beside kube-proxy in its nftables and iptables modes, and beside one rule written by hand that does
nothing but translate this one address. All nodes have the same Pods, links and rules of podwall's, so that
only the Services differ; no policy is there. The Service is one in the middle of all. Cases take turns in
every round, in another order each time; a case's loss is the median of its rounds against the rule by hand
of the same round, by CPU.

    .venv/bin/python bench/service_connections.py [--services 1000 10000] [--rounds 600]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence

from stage import connections, objects, sandbox
from stage.commits import listening
from stage.connections import Case, lost
from stage.figures import Target, machine, report, say, table
from stage.kube_proxy import KubeProxy
from stage.node import Node, places
from stage.objects import PROBED
from stage.serving import MODES, MOST, PEERS, PODWALL, packed

from agent.nft.kernel import Kernel
from lab import netns
from lab.names import NodePlace

START_LIMIT_S = 120.0
QUIET_S = 1.0
NOISE = 1.0  # percent by which equals may differ
PORT, TARGET_PORT = 80, 8080
BY_HAND, STRAIGHT = "one rule by hand", "no Service: straight to the Pod"
SERVERS = ("server-0", "server-1")

Serve = Callable[[Node, int, Sequence[str]], None]


def build(name: str, place: NodePlace, services: int, serve: Serve) -> Case:
    """A node with its Pods, and a Service served by one of the peers or otherwise."""
    cluster = (*objects.nodes(place, 1), *objects.namespaces(), *objects.services(services))
    node = Node(place, cluster, {"services": "on" if name == PODWALL else "off"})
    connections.prepare_node(node.path)
    node.start()
    client, *servers = node.attach(
        [objects.pod(PROBED, app, place.name, {"app": app}) for app in ("client", *SERVERS)]
    )
    connections.prepare_client(client.path)
    addresses = [str(box.addresses[0]) for box in servers]
    for box, address in zip(servers, addresses, strict=True):
        connections.Server(box.path, address, TARGET_PORT)
    number = services // 2
    with listening(node.path) as commits:
        node.api.put(objects.endpoint_slice(number, *addresses, node=place.name))
        serve(node, number, addresses)
        try:
            commits.heard(START_LIMIT_S, packed(addresses[1]))
        except TimeoutError as error:
            sys.exit(f"{name}, {services} Services: {error}")
        commits.quiet(QUIET_S, START_LIMIT_S)
    to = (objects.cluster_ip(number), PORT) if name != STRAIGHT else (addresses[0], TARGET_PORT)
    shown = name if name in {BY_HAND, STRAIGHT} else f"{services} Services, {name}"
    return Case(shown, client.path, *to)


def by_podwall(_node: Node, _number: int, _addresses: Sequence[str]) -> None:
    """The node's own agent does."""


def by_kube_proxy(name: str) -> Serve:
    """kube-proxy does, in one of its modes."""

    def serve(node: Node, _number: int, _addresses: Sequence[str]) -> None:
        KubeProxy(node.place, MODES[name]).start()

    return serve


def by_hand(node: Node, number: int, addresses: Sequence[str]) -> None:
    """One rule does, that knows no more than this Service."""
    one, other = (f"{address} . {TARGET_PORT}" for address in addresses)
    rules = f"""table ip bench {{
        chain services {{
            type nat hook prerouting priority dstnat; policy accept;
            ip daddr {objects.cluster_ip(number)} tcp dport {PORT} \
                dnat to numgen random mod 2 map {{ 0 : {one}, 1 : {other} }}
        }}
    }}
    """
    netns.run(node.path, asyncio.run, _commit(rules))


async def _commit(rules: str) -> None:
    async with Kernel() as kernel:
        await kernel.commit(rules)


def build_all(sizes: Sequence[int], peers: Sequence[str]) -> dict[tuple[str, int], Case]:
    """All cases: the rule by hand first."""
    nodes = places()
    cases = {}
    for name in (BY_HAND, STRAIGHT):
        cases[name, 1] = build(name, next(nodes), 1, by_hand)
    for services in sizes:
        for name in peers:
            if services <= MOST.get(name, services):
                say(f"starting with {services} Services: {name}")
                serve = by_podwall if name == PODWALL else by_kube_proxy(name)
                cases[name, services] = build(name, next(nodes), services, serve)
    return cases


def show(cases: Sequence[Case], base: Case) -> Iterator[str]:
    yield from table(connections.HEAD, [connections.row(case, base) for case in cases])


def targets(cases: dict[tuple[str, int], Case]) -> Iterator[Target]:
    largest = max(services for _, services in cases)
    podwall, nftables = cases.get((PODWALL, largest)), cases.get(("kube-proxy nftables", largest))
    if podwall:
        what = f"podwall, {largest} Services: lost against"
        yield Target(f"{what} {BY_HAND}", lost(podwall, cases[BY_HAND, 1]), 5, "%")
        if nftables:
            yield Target(f"{what} kube-proxy nftables", lost(podwall, nftables), NOISE, "%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    arguments = parser.parse_args()
    sandbox.enter()
    print(*machine(), "", sep="\n", flush=True)
    connections.build()
    cases = build_all(arguments.services, arguments.peers)
    connections.rounds(list(cases.values()), arguments.rounds)
    say("")
    print(*show(list(cases.values()), cases[BY_HAND, 1]), "", sep="\n")
    report(targets(cases))


if __name__ == "__main__":
    main()
