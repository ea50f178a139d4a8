"""Addresses for Pods of manifests that have never run: selectors and ports can be judged all the same. Pure.

Pod shop/web, no status  -->  Pod shop/web, 100.64.0.1        (RFC 6598: nobody's on the Internet)

What a policy says by ipBlock cannot be judged so.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network

import msgspec

from agent.cluster.model import IPAddress, Object, Pod
from agent.cluster.store import Snapshot, snapshot_of

RANGE = IPv4Network("100.64.0.0/10")


def with_addresses(snapshot: Snapshot) -> tuple[Snapshot, tuple[Pod, ...]]:
    """The same objects, where each Pod that may get an address has one, and the Pods that were given it.

    A Pod on its node's network has the node's addresses, where the Node says them.
    """
    free = _free(snapshot)
    given = {
        pod.key: msgspec.structs.replace(
            pod, ips=_node_ips(snapshot, pod) if pod.host_network else (next(free),)
        )
        for _, pod in sorted(snapshot.pods.items())
        if not pod.ips and not pod.finished
    }
    if not given:
        return snapshot, ()
    objects: tuple[Object, ...] = (
        *snapshot.nodes.values(),
        *snapshot.namespaces.values(),
        *(given.get(key, pod) for key, pod in snapshot.pods.items()),
        *snapshot.policies.values(),
        *snapshot.services.values(),
        *snapshot.slices.values(),
    )
    return snapshot_of(objects), tuple(pod for pod in given.values() if not pod.host_network)


def _free(snapshot: Snapshot) -> Iterator[IPAddress]:
    return (address for address in RANGE.hosts() if address not in snapshot.pods_by_ip)


def _node_ips(snapshot: Snapshot, pod: Pod) -> tuple[IPAddress, ...]:
    node = snapshot.nodes.get(pod.node)
    return node.internal_ips if node else ()
