"""What Kubernetes' documentation says of a packet to a Service, straight from the manifests.

It shares nothing with the compiler: it walks through all Services for each packet.  Its sources are the pages
"Service", "Virtual IPs and Service Proxies", "EndpointSlices" and "Topology Aware Routing", and the API's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Literal

Origin = Literal["pod", "node", "other pod", "outside"]
Backend = tuple[str, int]


@dataclass(frozen=True)
class Probe:
    """A first packet: from a Pod of this node, the node itself, a Pod of another node, or anywhere else."""

    origin: Origin
    source: str
    target: str
    protocol: str
    port: int


@dataclass(frozen=True)
class Fate:
    """Where a packet may go: to one of these endpoints, or it is refused, dropped or left alone."""

    outcome: Literal["endpoint", "refused", "dropped", "untouched"]
    endpoints: frozenset[Backend] = frozenset()


class ServiceOracle:
    """A cluster, as one node sees it."""

    def __init__(
        self,
        manifests: Iterable[dict[str, Any]],
        node: str,
        own_addresses: Iterable[str],
        external_ips: Iterable[str] = (),
        node_port_addresses: Iterable[str] = (),
    ) -> None:
        self.manifests = list(manifests)
        self.node, self.own = node, frozenset(own_addresses)
        self.external_ips = [ip_network(each) for each in external_ips]
        self.node_port_addresses = [ip_network(each) for each in node_port_addresses]

    def fate(self, probe: Probe) -> Fate:
        service, port, kind = self._find(probe)
        if service is None:
            known = any(probe.target in _cluster_ips(each) for each in self._services())
            return Fate("refused" if known else "untouched")
        if kind == "load balancer" and not _admits(service, probe.source):
            return Fate("dropped")
        everywhere = self._endpoints(service, port, probe, local=False)
        if kind == "cluster":
            local = service["spec"].get("internalTrafficPolicy") == "Local"
        else:
            # A Pod of another node that comes to this node asks this node: else its own had answered.
            others = {"outside", "other pod"} if kind == "node" else {"outside"}
            local = probe.origin in others and service["spec"].get("externalTrafficPolicy") == "Local"
        if not local:
            return Fate("endpoint", everywhere) if everywhere else Fate("refused")
        here = self._endpoints(service, port, probe, local=True)
        if here:
            return Fate("endpoint", here)
        return Fate("refused" if kind == "cluster" or not everywhere else "dropped")

    def source(self, probe: Probe, endpoint: Backend, links: Iterable[str]) -> str:
        """From whom it goes on: "kept", "node" (from this node), or "itself" where a Pod reached itself."""
        if probe.origin == "pod":
            return "itself" if endpoint[0] == probe.source else "kept"
        if probe.origin == "node" or endpoint[0] in links or endpoint[0] in self.own:
            return "kept"
        return "node"

    # Which Service

    def _find(self, probe: Probe) -> tuple[Any, Any, str]:
        """The Service, its port and the kind of address that the packet came to; the oldest has it."""
        for service in self._services():
            for port in service["spec"]["ports"]:
                if (port.get("protocol", "TCP"), port["port"]) != (probe.protocol, probe.port):
                    continue
                for kind, address in self._addresses(service):
                    if address == probe.target:
                        return service, port, kind
        for service in self._services():
            for port in service["spec"]["ports"]:
                number = (
                    port.get("nodePort")
                    if service["spec"].get("type") in {"NodePort", "LoadBalancer"}
                    else None
                )
                if (port.get("protocol", "TCP"), number) == (probe.protocol, probe.port):
                    # One Service has a port of the nodes, in whichever families.
                    return (service, port, "node") if self._by_node_port(service, probe) else (None, None, "")
        return None, None, ""

    def _by_node_port(self, service: Any, probe: Probe) -> bool:
        if not any(
            ip_address(ip).version == ip_address(probe.target).version for ip in _cluster_ips(service)
        ):
            return False
        if self.node_port_addresses and not any(
            ip_address(probe.target) in each for each in self.node_port_addresses
        ):
            return False
        if probe.target in self.own:
            return True
        # Another node's is answered here for who speaks here, unless that node's own Pods are asked for.
        local = service["spec"].get("externalTrafficPolicy") == "Local"
        others = {
            each["address"]
            for node in self._of("Node")
            if node["metadata"]["name"] != self.node
            for each in node["status"]["addresses"]
        }
        return probe.origin in {"pod", "node"} and probe.target in others and not local

    def _services(self) -> list[Any]:
        """Those that are served, the oldest first."""
        served = [each for each in self._of("Service") if _cluster_ips(each) and not _somebody_elses(each)]
        return sorted(
            served,
            key=lambda of: (
                of["metadata"].get("creationTimestamp") or "9999",
                of["metadata"]["namespace"],
                of["metadata"]["name"],
            ),
        )

    def _addresses(self, service: Any) -> Iterator[tuple[str, str]]:
        for ip in _cluster_ips(service):
            yield "cluster", ip
        for ip in service["spec"].get("externalIPs", ()):
            if any(ip_address(ip) in allowed for allowed in self.external_ips):
                yield "external", ip
        if service["spec"].get("type") == "LoadBalancer":
            for each in service["status"].get("loadBalancer", {}).get("ingress", ()):
                if each.get("ipMode", "VIP") == "VIP":
                    yield "load balancer", each["ip"]

    # Which endpoints

    def _endpoints(self, service: Any, port: Any, probe: Probe, *, local: bool) -> frozenset[Backend]:
        version = ip_address(probe.target).version
        found: dict[Backend, Any] = {}
        for of in self._of("EndpointSlice"):
            meta = of["metadata"]
            if meta["namespace"] != service["metadata"]["namespace"] or _somebody_elses(of):
                continue
            if meta["labels"].get("kubernetes.io/service-name") != service["metadata"]["name"]:
                continue
            for named in of["ports"]:
                same = named.get("name", "") == port.get("name", "")
                if same and named.get("protocol", "TCP") == port.get("protocol", "TCP"):
                    for endpoint in of["endpoints"]:
                        ip = ip_address(endpoint["addresses"][0])
                        if ip.version == version and of["addressType"] == f"IPv{version}" and _usable(ip):
                            known = found.get((str(ip), named["port"]))
                            if known is None or _state(endpoint) > _state(known):
                                found[str(ip), named["port"]] = endpoint
        if local:
            found = {key: each for key, each in found.items() if each.get("nodeName") == self.node}
        ready = {key: each for key, each in found.items() if _is_ready(each)}
        if ready:
            return frozenset(ready if local else self._hinted(ready))
        return frozenset(
            key for key, each in found.items() if _is_serving(each) and each["conditions"].get("terminating")
        )

    def _hinted(self, ready: dict[Backend, Any]) -> dict[Backend, Any]:
        zone = next(
            (
                each["metadata"]["labels"].get("topology.kubernetes.io/zone")
                for each in self._of("Node")
                if each["metadata"]["name"] == self.node
            ),
            None,
        )
        for hints, here in (("forNodes", self.node), ("forZones", zone)):
            said = {
                key: [hint["name"] for hint in each.get("hints", {}).get(hints, ())]
                for key, each in ready.items()
            }
            meant = {key: each for key, each in ready.items() if here and here in said[key]}
            if all(said.values()) and meant:
                return meant
        return ready

    def _of(self, kind: str) -> Iterator[Any]:
        return (each for each in self.manifests if each["kind"] == kind)


def _cluster_ips(service: Any) -> list[str]:
    if service["spec"].get("type") == "ExternalName":
        return []
    return [ip for ip in service["spec"]["clusterIPs"] if ip and ip != "None"]


def _somebody_elses(of: Any) -> bool:
    labels = of["metadata"]["labels"]
    return bool(
        {"service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"} & labels.keys()
    )


def _admits(service: Any, source: str) -> bool:
    ranges = service["spec"].get("loadBalancerSourceRanges")
    if not ranges:
        return True
    return any(ip_address(source) in ip_network(each) for each in ranges)


def _usable(ip: Any) -> bool:
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified)


def _is_ready(endpoint: Any) -> bool:
    return endpoint["conditions"].get("ready") is not False


def _is_serving(endpoint: Any) -> bool:
    serving = endpoint["conditions"].get("serving")
    return _is_ready(endpoint) if serving is None else bool(serving)


def _state(endpoint: Any) -> tuple[bool, bool, bool]:
    return _is_ready(endpoint), _is_serving(endpoint), bool(endpoint["conditions"].get("terminating"))
