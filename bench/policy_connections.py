"""What policies cost a new connection: by how many the cluster has, and how many select the Pod.

    client Pod --SYN--> node: links, conntrack, policy --> server Pod          connect, reset, the next one

Each case is a node of its own with two Pods, wired alike, and podwall's compiled rules put in by its worker;
`on the Pod` is how many policies select the server, of which only the last lets the client in. The others of
the cluster select 100 more Pods of this node, so that their chains and sets are in its kernel, too. The base
is a table that accepts what conntrack calls new or established: what a kernel with connection tracking can
do at all; beside it stands one that has a chain of type nat, too, as every node must that translates
addresses. Cases take turns of 100 connections, another first in every round; a case's loss, by CPU, is the
median of its rounds against the base of the same round.

    .venv/bin/python bench/policy_connections.py [--rounds 600]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

from stage import connections, objects, sandbox
from stage.connections import Case, lost
from stage.figures import Target, machine, report, say, table
from stage.objects import PROBED, Object

from agent.cluster.decode import decode
from agent.cluster.model import Pod
from agent.cluster.store import Changed
from agent.compile import links, verdicts
from agent.compile.incremental import PolicyCompiler
from agent.compile.members import LocalPod
from agent.nft.diff import difference, transaction
from agent.nft.kernel import Kernel
from agent.nft.model import Ruleset
from agent.nft.owners import Desired
from lab import netns

IN_CLUSTER, ON_POD = (0, 100, 1000), (1, 10, 100)
PODS, LOCAL = 5000, 100
NOISE = 1.0  # percent by which equals may differ
PORT = 80
CLIENT, SERVER = "10.244.1.250", "10.244.1.251"
MACS = {CLIENT: "02:00:00:00:00:01", SERVER: "02:00:00:00:00:02"}
HOST_MAC = "ee:ee:ee:ee:ee:ee"

MASQUERADE = """
table inet bench_nat {
    chain leave {
        type nat hook postrouting priority 100; policy accept;
        ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
    }
}
"""

CONNTRACK_ONLY = """
table inet bench {
    chain forward {
        type filter hook forward priority 0; policy accept;
        ct state established accept
        ct state new accept
    }
}
"""


class Scene:
    """A node with two Pods and some rules."""

    def __init__(self, name: str, rules: str) -> None:
        self.name, self._rules = name, rules

    def build(self) -> Case:
        """Make it; the sandbox removes it."""
        for of in ("node", "client", "server"):
            netns.create(self._netns(of))
        node, client, server = (netns.path(self._netns(of)) for of in ("node", "client", "server"))
        connections.prepare_node(node)
        self._wire("client", "podwall0000000c", CLIENT)
        self._wire("server", "podwall0000000d", SERVER)
        connections.prepare_client(client)
        netns.run(node, asyncio.run, _commit(self._rules))
        connections.Server(server, SERVER, PORT)
        return Case(self.name, client, SERVER, PORT)

    def _netns(self, of: str) -> str:
        return f"bench-{self.name}-{of}".replace(" ", "-")

    def _wire(self, of: str, link: str, address: str) -> None:
        """A Pod's link as the agent makes it."""
        node, pod, mac = self._netns("node"), self._netns(of), MACS[address]
        host = f"ip -n {node}"
        inside = f"ip -n {pod}"
        peer = f"peer name eth0 address {mac} netns {pod}"
        _run(
            f"{host} link add {link} address {HOST_MAC} type veth {peer}",
            f"{host} link set {link} up",
            f"{host} route add {address} dev {link}",
            f"{host} neigh add {address} lladdr {mac} dev {link} nud permanent",
            f"{inside} addr add {address}/32 dev eth0",
            f"{inside} link set eth0 up",
            f"{inside} route add 169.254.1.1 dev eth0 scope link",
            f"{inside} route add default via 169.254.1.1",
            f"{inside} neigh add 169.254.1.1 lladdr {HOST_MAC} dev eth0 nud permanent",
        )


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


async def _commit(rules: str) -> None:
    async with Kernel() as kernel:
        await kernel.commit(rules)


# The rules


def compiled(in_cluster: int, on_pod: int) -> str:
    """podwall's rules of a node in a cluster with so many policies, and so many more on the server."""
    compiler = PolicyCompiler("node1")
    pods = [*objects.other_pods(PODS - LOCAL), *_local_pods()]
    policies = [*objects.policies(in_cluster), *_policies_on_server(on_pod)]
    models = [_decoded(item) for item in (*objects.namespaces(), *pods, *policies)]
    compiler.apply(Changed(kind, item.key, None, item) for kind, item in models)  # type: ignore[arg-type, attr-defined]
    desired = Desired()
    desired.replace(links.STATIC, links.static())
    desired.replace(links.CLUSTER, ())
    owners = {verdicts.STATIC}
    for _, item in models:
        if isinstance(item, Pod) and item.node == "node1":
            owners |= compiler.attach(LocalPod(item.name, "eth0", item.namespace, item.name, item.ips))
    for owner in owners:
        desired.replace(owner, compiler.items(owner))
    for link, address in (("podwall0000000c", CLIENT), ("podwall0000000d", SERVER)):
        items = links.link(link, (ip_address(address),), PROBED, link)
        desired.replace(links.link_owner(link, "eth0"), items)
    return transaction(difference(Ruleset(), desired.ruleset), desired.ruleset)


def _local_pods() -> Iterator[Object]:
    for number in range(LOCAL - 2):
        address = f"10.244.1.{2 + number}"
        namespace = f"ns-{number % objects.NAMESPACES}"
        yield objects.pod(namespace, f"local-{number}", "node1", objects.labels(number), address)
    yield objects.pod(PROBED, "client", "node1", {"app": "client"}, CLIENT)
    yield objects.pod(PROBED, "server", "node1", {"app": "server"}, SERVER)


def _policies_on_server(count: int) -> Iterator[Object]:
    """All but the last let somebody else in by the same port; they are asked in the order of their names."""
    for number in range(count):
        app = "client" if number == count - 1 else f"other-{number}"
        rule = {
            "from": [{"podSelector": {"matchLabels": {"app": app}}}],
            "ports": [{"protocol": "TCP", "port": PORT}],
        }
        server = {"matchLabels": {"app": "server"}}
        yield objects.policy(PROBED, f"policy-{number:03}", server, ingress=[rule])


def _decoded(item: Object) -> tuple[str, object]:
    return item["kind"], decode(item["kind"], json.dumps(item).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=600)
    arguments = parser.parse_args()
    sandbox.enter()
    print(*machine(), "", sep="\n", flush=True)
    connections.build()
    base = Scene("conntrack only", CONNTRACK_ONLY).build()
    translating = Scene("conntrack and masquerade", CONNTRACK_ONLY + MASQUERADE).build()
    unselected = Scene("podwall, no policy", compiled(0, 0)).build()
    by_count = {
        (cluster, pod): Scene(f"cluster {cluster} on the Pod {pod}", compiled(cluster, pod)).build()
        for pod in ON_POD
        for cluster in IN_CLUSTER
    }
    cases = [base, translating, unselected, *by_count.values()]
    connections.rounds(cases, arguments.rounds)
    say("")
    print(*table(connections.HEAD, [connections.row(case, base) for case in cases]), "", sep="\n")
    slopes = [lost(by_count[IN_CLUSTER[-1], pod], by_count[0, pod]) for pod in ON_POD]
    typical = by_count[1000, 10]
    report(
        [
            Target("0 to 1,000 in the cluster: lost", statistics.median(slopes), NOISE, "%"),
            Target(
                "1,000 in the cluster, 10 on the Pod: lost against no policy",
                lost(typical, unselected),
                5,
                "%",
            ),
            Target("the same against conntrack and masquerade", lost(typical, translating), 5, "%"),
            Target("the same against conntrack only", lost(typical, base), 5, "%"),
        ]
    )


if __name__ == "__main__":
    main()
