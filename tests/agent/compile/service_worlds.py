"""Clusters for the tests of Services: written as manifests, compiled for one node, judged by packets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agent.cluster.decode import decode
from agent.cluster.model import Key, Kind, Object, kind_of
from agent.cluster.store import Changed
from agent.compile.service import ServiceSettings
from agent.compile.services import ServiceCompiler
from agent.nft.model import Ruleset
from agent.nft.owners import Desired

NODE = "node-1"

Manifest = Mapping[str, Any]


def service(path: str, *cluster_ips: str, ports: Iterable[Any] = (80,), **spec: Any) -> dict[str, Any]:
    """A Service `namespace/name`; a port is a number or its manifest.

    `status`, `labels` and `created` are its own; all else is of its spec.
    """
    space, name = path.split("/")
    meta: dict[str, Any] = {"namespace": space, "name": name, "labels": spec.pop("labels", {})}
    if created := spec.pop("created", ""):
        meta["creationTimestamp"] = created
    status = spec.pop("status", {})
    said = [{"port": each} if isinstance(each, int) else each for each in ports]
    spec = {"clusterIPs": list(cluster_ips), "clusterIP": cluster_ips[0] if cluster_ips else "", **spec}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"ports": said, **spec},
        "status": status,
    }


def load_balancer(*addresses: str, mode: str = "VIP") -> dict[str, Any]:
    """The status of a Service that was given these addresses."""
    return {"loadBalancer": {"ingress": [{"ip": ip, "ipMode": mode} for ip in addresses]}}


def endpoint(
    ip: str,
    *,
    node: str = NODE,
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool = False,
    zone: str = "",
    zones: Iterable[str] = (),
    nodes: Iterable[str] = (),
) -> dict[str, Any]:
    """An endpoint; `zones` and `nodes` are its hints."""
    hints = {"forZones": [{"name": each} for each in zones], "forNodes": [{"name": each} for each in nodes]}
    return {
        "addresses": [ip],
        "nodeName": node,
        "zone": zone,
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "hints": hints,
    }


def endpoint_slice(
    path: str, of: str, *endpoints: Any, ports: Iterable[Any] = (8080,), **labels: str
) -> dict[str, Any]:
    """A slice of Service `of`; an endpoint is an address or its manifest, a port a number or its manifest."""
    space, name = path.split("/")
    said = [endpoint(each) if isinstance(each, str) else each for each in endpoints]
    version = 6 if any(":" in each["addresses"][0] for each in said) else 4
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": space,
            "name": name,
            "labels": {"kubernetes.io/service-name": of, **labels},
        },
        "addressType": f"IPv{version}",
        "endpoints": said,
        "ports": [{"port": each, "name": ""} if isinstance(each, int) else each for each in ports],
    }


def node(
    name: str, *ips: str, cidrs: Iterable[str] = (), external: Iterable[str] = (), **labels: str
) -> dict[str, Any]:
    """A Node with its internal addresses and Pod ranges."""
    addresses = [{"type": "InternalIP", "address": ip} for ip in ips]
    addresses += [{"type": "ExternalIP", "address": ip} for ip in external]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDRs": list(cidrs)},
        "status": {"addresses": addresses},
    }


def in_zone(manifest: dict[str, Any], zone: str) -> dict[str, Any]:
    """A Node in a zone."""
    manifest["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone
    return manifest


def decoded(manifest: Manifest) -> Object:
    kind: Kind = manifest["kind"]
    of = decode(kind, manifest)
    assert type(of).__name__ == kind
    return of  # type: ignore[return-value]  # no Endpoints here


class ServiceWorld:
    """A node in a cluster whose objects come and go."""

    def __init__(self, *manifests: Manifest, settings: ServiceSettings | None = None) -> None:
        self.settings = settings or ServiceSettings()
        self.compiler = ServiceCompiler(NODE, self.settings)
        self.desired = Desired()
        self.objects: dict[tuple[Kind, Key], Object] = {}
        self._compile(self.compiler.owners)
        self.put(*manifests)

    @property
    def ruleset(self) -> Ruleset:
        return self.desired.ruleset

    def put(self, *manifests: Manifest) -> frozenset[tuple[str, ...]]:
        """Objects are there, new or changed; returns the owners that were compiled."""
        return self._take((each["kind"], decoded(each)) for each in manifests)

    def remove(self, *manifests: Manifest) -> frozenset[tuple[str, ...]]:
        """Objects are gone."""
        return self.take_away(*map(decoded, manifests))

    def take_away(self, *objects: Object) -> frozenset[tuple[str, ...]]:
        """Objects are gone."""
        gone = [(kind_of(each), each.key) for each in objects]
        changes = [Changed(kind, key, self.objects.pop((kind, key)), None) for kind, key in gone]
        return self._compile(self.compiler.apply(changes))

    def _take(self, objects: Iterable[tuple[Kind, Object]]) -> frozenset[tuple[str, ...]]:
        changes = []
        for kind, after in objects:
            changes.append(Changed(kind, after.key, self.objects.get((kind, after.key)), after))
            self.objects[kind, after.key] = after
        return self._compile(self.compiler.apply(changes))

    def _compile(self, owners: frozenset[tuple[str, ...]]) -> frozenset[tuple[str, ...]]:
        for owner in owners:
            self.desired.replace(owner, self.compiler.items(owner))
        return owners
