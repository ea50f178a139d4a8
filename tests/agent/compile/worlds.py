"""Clusters for the policy tests: written as manifests, compiled for one node, judged packet by packet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

from agent.cluster.decode import decode
from agent.cluster.model import Key, Kind, Object
from agent.cluster.store import Changed
from agent.compile import links
from agent.compile.incremental import PolicyCompiler
from agent.compile.members import LocalPod
from agent.nft.evaluate import FORWARDED, RECEIVED, Evaluator, Result
from agent.nft.model import FibType, Icmp6Type, IcmpType, Item, Proto, Ruleset, TcpFlag
from agent.nft.model import Key as NftKey
from agent.nft.owners import Desired
from agent.nft.packet import Connection, Packet
from lab.expectation import FirstPacket, pod_addresses

NODE = "node-1"
NODE_ADDRESSES = ("192.168.10.1", "fd00:10::1")
PROTOCOLS = {"TCP": Proto.TCP, "UDP": Proto.UDP, "SCTP": Proto.SCTP, "GRE": 47}

Manifest = Mapping[str, Any]


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(
    path: str,
    *ips: str,
    node: str = NODE,
    ports: Iterable[tuple[str, int] | tuple[str, int, str]] = (),
    phase: str = "Running",
    host_network: bool = False,
    uid: str = "",
    **labels: str,
) -> dict[str, Any]:
    """A Pod `namespace/name`; ports are (name, number) or (name, number, protocol)."""
    space, name = path.split("/")
    said = [
        {"name": each[0], "containerPort": each[1], "protocol": each[2] if len(each) > 2 else "TCP"}
        for each in ports
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": space, "name": name, "labels": labels, "uid": uid or f"uid-of-{name}"},
        "spec": {
            "nodeName": node,
            "hostNetwork": host_network,
            "containers": [{"name": "main", "ports": said}],
        },
        "status": {"phase": phase, "podIPs": [{"ip": ip} for ip in ips], "podIP": ips[0] if ips else ""},
    }


def policy(path: str, **spec: Any) -> dict[str, Any]:
    """A policy `namespace/name`; without a podSelector it selects all Pods."""
    space, name = path.split("/")
    spec.setdefault("podSelector", {})
    meta = {"namespace": space, "name": name}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}


def decoded(manifest: Manifest) -> Object:
    kind: Kind = manifest["kind"]
    of = decode(kind, manifest)
    assert type(of).__name__ == kind
    return of  # type: ignore[return-value]  # no Endpoints here


def link_of(of: Manifest) -> str:
    """The host end of a Pod's link."""
    return f"podwall{sha256(_path(of).encode()).hexdigest()[:8]}"


def _path(of: Manifest) -> str:
    return f"{of['metadata'].get('namespace', '')}/{of['metadata']['name']}"


def attachment(of: Manifest) -> LocalPod:
    space, name = _path(of).split("/")
    addresses = tuple(map(ip_address, pod_addresses(of)))
    return LocalPod(f"container-{space}-{name}", "eth0", space, name, addresses, of["metadata"]["uid"])


def is_attached(of: Manifest) -> bool:
    """Whether a Pod of this world is on this node's network."""
    return of["kind"] == "Pod" and of["spec"]["nodeName"] == NODE and bool(pod_addresses(of))


class World:
    """A node in a cluster: objects and attachments come and go, packets are judged."""

    def __init__(self, *manifests: Manifest) -> None:
        self._links: dict[str, str] = {}  # of attached Pods, whatever their status says
        self.compiler = PolicyCompiler(NODE)
        self.desired = Desired()
        self.desired.replace(("links",), links.static())
        self.desired.replace(("policy",), self.compiler.items(("policy",)))
        self.manifests: dict[tuple[Kind, Key], Manifest] = {}
        self._evaluator: Evaluator | None = None
        self.put(*manifests)

    @property
    def ruleset(self) -> Ruleset:
        return self.desired.ruleset

    def put(self, *manifests: Manifest, attach: bool = True) -> None:
        """Objects are there, new or changed; Pods of this node get their links too."""
        changes = []
        for each in manifests:
            after = decoded(each)
            before = self.manifests.get((each["kind"], after.key))
            changes.append(Changed(each["kind"], after.key, decoded(before) if before else None, after))
            self.manifests[each["kind"], after.key] = each
        self._compile(self.compiler.apply(changes))
        for each in manifests if attach else ():
            if is_attached(each):
                self.attach(each)
            elif each["kind"] == "Pod":
                self.detach(each)

    def remove(self, *manifests: Manifest) -> None:
        """Objects are gone; attachments stay until `detach`."""
        changes = []
        for each in manifests:
            before = decoded(each)
            changes.append(Changed(each["kind"], before.key, before, None))
            self.manifests.pop((each["kind"], before.key), None)
        self._compile(self.compiler.apply(changes))

    def attach(self, of: Manifest) -> None:
        local = attachment(of)
        items = links.link(link_of(of), local.addresses, local.namespace, local.name)
        self.desired.replace(links.link_owner(local.container_id, local.ifname), items)
        self._links |= {str(address): link_of(of) for address in local.addresses}
        self._compile(self.compiler.attach(local))

    def detach(self, of: Manifest) -> None:
        local = attachment(of)
        self._compile(self.compiler.detach(local.container_id, local.ifname))
        self.desired.replace(links.link_owner(local.container_id, local.ifname), ())
        for address in map(str, local.addresses):
            self._links.pop(address, None)

    def _compile(self, owners: Iterable[tuple[str, ...]]) -> None:
        for owner in owners:
            self.desired.replace(owner, self.compiler.items(owner))
        self._evaluator = None

    def full(self) -> Ruleset:
        """Everything compiled again from nothing, as after a restart."""
        return World(*self.manifests.values()).ruleset

    def judge(self, probe: FirstPacket, connection: Connection | None = None, **facts: Any) -> Result:
        """Send a packet from and to where these addresses are, seen from this node."""
        if self._evaluator is None:
            self._evaluator = Evaluator(self.ruleset, _fib)
        hooks = RECEIVED if probe.target in NODE_ADDRESSES else FORWARDED
        packet = Packet(
            ip_address(probe.source),
            ip_address(probe.target),
            **{
                **_transport(probe),
                "iifname": self._link(probe.source),
                "oifname": "" if hooks is RECEIVED else self._link(probe.target),
                **facts,
            },
        )
        return self._evaluator.judge(packet, hooks, connection)

    def accepts(self, source: str, target: str, port: int | None = 80, protocol: str = "TCP") -> bool:
        return self.judge(FirstPacket(source, target, protocol, port)).accepted

    def _link(self, address: str) -> str:
        if address in self._links:
            return self._links[address]
        for each in self.manifests.values():
            if is_attached(each) and address in pod_addresses(each):
                return link_of(each)
        return "eth0"


def _transport(probe: FirstPacket) -> dict[str, Any]:
    if probe.protocol == "ICMP":
        v4 = ip_address(probe.source).version == 4
        kind = IcmpType.ECHO_REQUEST if v4 else Icmp6Type.ECHO_REQUEST
        return {"l4proto": Proto.ICMP if v4 else Proto.ICMPV6, "icmp_type": kind}
    flags = TcpFlag.SYN if probe.protocol == "TCP" else 0
    return {
        "l4proto": PROTOCOLS[probe.protocol],
        "sport": 40000,
        "dport": probe.port or 0,
        "tcp_flags": flags,
    }


def _fib(flags: tuple[str, ...], result: str, packet: Packet) -> NftKey:
    assert (flags, result) == (("daddr",), "type")
    return FibType.LOCAL if str(packet.target) in NODE_ADDRESSES else FibType.UNICAST


def texts(items: Iterable[Item]) -> list[str]:
    return sorted(map(repr, items))
