"""Services: what the API server fills in, and the EndpointSlices that controllers derive. Pure.

A Service without addresses gets the first free ones, and keeps them. Slices follow the Pods that its selector
picks; a Service without a selector has the slices or Endpoints that a user wrote.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from lab.names import SERVICE_CIDRS, Address
from lab.objects import Key, Object, digest, fail, key_of, labels

NODE_PORTS = range(30000, 32768)
_FIRST_DYNAMIC = 30086
"""Below are the node ports for those who name one: KEP-3668's band of 86 for this range."""

FAMILIES = ("IPv4", "IPv6")
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
ZONE = "topology.kubernetes.io/zone"
_SERVICE_NAME = "kubernetes.io/service-name"
_SLICE_LIMIT = 100


def allocate(services: Sequence[Object], before: Mapping[Key, Object]) -> list[Object]:
    """Return Services with the API server's defaults, cluster addresses and node ports.

    Raises ManifestError for an address or node port that is taken or outside its range.
    """
    services = [_with_defaults(service, before.get(key_of(service), {})) for service in services]
    taken = _Taken()
    for service in services:
        taken.explicit(service)
    for service in services:
        taken.fill_in(service)
    return services


def slices(
    services: Iterable[Object],
    pods: Iterable[Object],
    endpoints: Iterable[Object],
    zones: Mapping[str, str] | None = None,
) -> dict[Key, Object]:
    """Return the EndpointSlices of Services with a selector, and those that mirror Endpoints.

    zones are the nodes' by their names.
    """
    by_namespace: dict[str, list[Object]] = defaultdict(list)
    for pod in pods:
        by_namespace[pod["metadata"]["namespace"]].append(pod)
    selected: set[tuple[str, str]] = set()
    made: list[Object] = []
    for service in services:
        if service["spec"].get("selector") and service["spec"].get("type") != "ExternalName":
            selected.add((key_of(service).namespace, key_of(service).name))
            made += _selected(service, by_namespace[key_of(service).namespace], zones or {})
    for item in endpoints:
        if (key_of(item).namespace, key_of(item).name) not in selected:
            made += _mirrored(item)
    return {key_of(item): item for item in made}


# What the API server fills in


def _with_defaults(service: Object, before: Object) -> Object:
    service = copy.deepcopy(service)
    spec = service.get("spec")
    if not isinstance(spec, dict):
        raise fail(service, "spec", "is missing")
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    spec.setdefault("internalTrafficPolicy", "Cluster")
    if spec["type"] in ("NodePort", "LoadBalancer"):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    for number, port in enumerate(spec.get("ports") or ()):
        if not isinstance(port, dict) or not isinstance(port.get("port"), int):
            raise fail(service, f"spec.ports[{number}].port", "must be a number")
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port["port"])
    _set_families(service, spec)
    _keep_allocations(spec, before.get("spec", {}))
    return service


def _set_families(service: Object, spec: Object) -> None:
    given = [address for address in spec.get("clusterIPs") or [spec.get("clusterIP")] if address]
    if spec["type"] == "ExternalName":
        return
    if given == ["None"]:
        default = list(FAMILIES) if not spec.get("selector") else [FAMILIES[0]]
    else:
        default = [_family(_address(service, text)) for text in given] or [FAMILIES[0]]
    policy = spec.setdefault("ipFamilyPolicy", "SingleStack" if len(default) == 1 else "RequireDualStack")
    families = spec.setdefault("ipFamilies", default)
    if policy != "SingleStack" and len(families) == 1:
        families += [family for family in FAMILIES if family not in families]


def _keep_allocations(spec: Object, before: Object) -> None:
    if not spec.get("clusterIP") and before.get("ipFamilies") == spec.get("ipFamilies"):
        kept = before.get("clusterIPs") or []
        if kept and kept[0] != "None" and spec["type"] != "ExternalName":
            spec |= {"clusterIP": kept[0], "clusterIPs": list(kept)}
    if spec["type"] not in ("NodePort", "LoadBalancer"):
        return
    ports = {
        (port["port"], port["protocol"]): port.get("nodePort")
        for port in before.get("ports") or ()
        if isinstance(port, dict)
    }
    for port in spec.get("ports") or ():
        if known := ports.get((port["port"], port["protocol"])):
            port.setdefault("nodePort", known)


class _Taken:
    """Addresses and node ports that some Service has."""

    def __init__(self) -> None:
        self._addresses: dict[Address, Key] = {}
        self._node_ports: dict[tuple[str, int], Key] = {}

    def explicit(self, service: Object) -> None:
        spec = service["spec"]
        for text in spec.get("clusterIPs") or [spec.get("clusterIP")]:
            if text and text != "None":
                self._claim_address(service, _address(service, text))
        for port in spec.get("ports") or ():
            if number := port.get("nodePort"):
                self._claim_node_port(service, port["protocol"], number)

    def fill_in(self, service: Object) -> None:
        spec = service["spec"]
        if spec["type"] == "ExternalName":
            return
        if spec.get("clusterIP") == "None":
            spec["clusterIPs"] = ["None"]
        else:
            self._fill_in_addresses(service, spec)
        if spec["type"] == "NodePort" or (
            spec["type"] == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts", True)
        ):
            for port in spec.get("ports") or ():
                if not port.get("nodePort"):
                    port["nodePort"] = self._free_node_port(service, port["protocol"])

    def _fill_in_addresses(self, service: Object, spec: Object) -> None:
        given = list(spec.get("clusterIPs") or [address for address in [spec.get("clusterIP")] if address])
        have = {_family(ip_address(text)) for text in given}
        for family in spec["ipFamilies"]:
            if family not in have:
                address = self._free_address(family)
                self._claim_address(service, address)
                given.append(str(address))
        spec |= {"clusterIP": given[0], "clusterIPs": given}

    def _claim_address(self, service: Object, address: Address) -> None:
        cidr = next(cidr for cidr in SERVICE_CIDRS if cidr.version == address.version)
        if address not in cidr:
            raise fail(service, "spec.clusterIP", f"{address} is not in the lab's Service range {cidr}")
        if address in self._addresses:
            raise fail(service, "spec.clusterIP", f"{address} belongs to {self._addresses[address]}")
        self._addresses[address] = key_of(service)

    def _claim_node_port(self, service: Object, protocol: str, number: int) -> None:
        if number not in NODE_PORTS:
            raise fail(service, "spec.ports.nodePort", f"{number} is not in 30000 to 32767")
        if (protocol, number) in self._node_ports:
            owner = self._node_ports[protocol, number]
            raise fail(service, "spec.ports.nodePort", f"{protocol} {number} belongs to {owner}")
        self._node_ports[protocol, number] = key_of(service)

    def _free_address(self, family: str) -> Address:
        cidr = SERVICE_CIDRS[FAMILIES.index(family)]
        return next(address for address in cidr.hosts() if address not in self._addresses)

    def _free_node_port(self, service: Object, protocol: str) -> int:
        candidates = itertools.chain(range(_FIRST_DYNAMIC, NODE_PORTS.stop), range(30000, _FIRST_DYNAMIC))
        number = next((port for port in candidates if (protocol, port) not in self._node_ports), None)
        if number is None:
            raise fail(service, "spec.ports.nodePort", "no node port is free")
        self._node_ports[protocol, number] = key_of(service)
        return number


def _address(service: Object, text: Any) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise fail(service, "spec.clusterIP", f"{text!r} is neither an address nor None") from None


def _family(address: Address) -> str:
    return FAMILIES[0] if address.version == 4 else FAMILIES[1]


# What the controllers derive


def _selected(service: Object, pods: Iterable[Object], zones: Mapping[str, str]) -> Iterator[Object]:
    spec = service["spec"]
    chosen = [pod for pod in pods if spec["selector"].items() <= labels(pod).items()]
    for family in spec.get("ipFamilies") or FAMILIES[:1]:
        groups: dict[tuple[tuple[str, str, int], ...], list[Object]] = defaultdict(list)
        for pod in sorted(chosen, key=lambda pod: str(pod["metadata"]["name"])):
            for address in _pod_addresses(pod, family):
                groups[_ports_of(service, pod)].append(_endpoint(service, pod, address, zones))
        for ports, found in sorted(groups.items()) or [((), [])]:
            for start in range(0, max(len(found), 1), _SLICE_LIMIT):
                yield _slice(service, family, ports, found[start : start + _SLICE_LIMIT], start)


def _pod_addresses(pod: Object, family: str) -> list[str]:
    addresses = [entry["ip"] for entry in pod.get("status", {}).get("podIPs") or ()]
    return [address for address in addresses if _family(ip_address(address)) == family]


def _ports_of(service: Object, pod: Object) -> tuple[tuple[str, str, int], ...]:
    """Return name, protocol and number of a Service's ports on this Pod; a name it lacks is left out."""
    named = {
        (port["name"], port.get("protocol", "TCP")): port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports") or ()
        if port.get("name")
    }
    found = []
    for port in service["spec"].get("ports") or ():
        target = port["targetPort"]
        number = target if isinstance(target, int) else named.get((target, port["protocol"]))
        if number is not None:
            found.append((port.get("name", ""), port["protocol"], number))
    return tuple(found)


def _endpoint(service: Object, pod: Object, address: str, zones: Mapping[str, str]) -> Object:
    conditions = {entry["type"]: entry["status"] for entry in pod.get("status", {}).get("conditions") or ()}
    terminating = "deletionTimestamp" in pod["metadata"]
    serving = conditions.get("Ready") == "True"
    ready = bool(service["spec"].get("publishNotReadyAddresses")) or (serving and not terminating)
    node = pod["spec"].get("nodeName", "")
    made: Object = {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "nodeName": node,
        "targetRef": {
            "kind": "Pod",
            "namespace": pod["metadata"]["namespace"],
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"].get("uid", ""),
        },
    }
    if zone := zones.get(node):
        made["zone"] = zone
    if ready and (hints := _hints(service["spec"].get("trafficDistribution"), node, zone)):
        made["hints"] = hints
    return made


def _hints(distribution: str | None, node: str, zone: str | None) -> Object:
    """Say for whom an endpoint is meant; a reader that knows no nodes goes by the zones (KEP-3015)."""
    zones: Object = {"forZones": [{"name": zone}]} if zone else {}
    match distribution:
        case "PreferClose" | "PreferSameZone":
            return zones
        case "PreferSameNode":
            return {"forNodes": [{"name": node}], **zones}
    return {}


def _slice(
    service: Object, family: str, ports: Sequence[tuple[str, str, int]], endpoints: list[Object], start: int
) -> Object:
    name = key_of(service).name
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{digest([family, ports, start], 5)}",
            "namespace": key_of(service).namespace,
            "labels": {_SERVICE_NAME: name, MANAGED_BY: "endpointslice-controller.k8s.io"},
        },
        "addressType": family,
        "ports": [{"name": name, "protocol": protocol, "port": port} for name, protocol, port in ports],
        "endpoints": endpoints,
    }


def _mirrored(item: Object) -> Iterator[Object]:
    for number, subset in enumerate(item.get("subsets") or ()):
        ports = [
            (port.get("name", ""), port.get("protocol", "TCP"), port["port"])
            for port in subset.get("ports") or ()
        ]
        for family in FAMILIES:
            found = list(_mirrored_endpoints(item, subset, family))
            if found:
                mirror = _slice(item, family, ports, found, number)
                mirror["metadata"]["labels"][MANAGED_BY] = "endpointslicemirroring-controller.k8s.io"
                yield mirror


def _mirrored_endpoints(item: Object, subset: Object, family: str) -> Iterator[Object]:
    for field, ready in (("addresses", True), ("notReadyAddresses", False)):
        for entry in subset.get(field) or ():
            if _family(_address(item, entry.get("ip"))) == family:
                yield {"addresses": [entry["ip"]], "conditions": {"ready": ready}}
