"""A lab's Service as tests and the command see it: the addresses and ports by which it is reached. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from lab.names import Address
from lab.objects import Object, key_of
from lab.processes import LabError


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service; node_port is 0 where it has none."""

    name: str
    protocol: str
    port: int
    node_port: int


@dataclass(frozen=True, slots=True)
class LabService:
    """A Service and its addresses; a headless one has no cluster addresses."""

    namespace: str
    name: str
    type: str
    cluster_addresses: tuple[Address, ...]
    external_addresses: tuple[Address, ...]
    balanced_addresses: tuple[Address, ...]
    ports: tuple[ServicePort, ...]

    @property
    def full_name(self) -> str:
        """Namespace and name."""
        return f"{self.namespace}/{self.name}"

    def address(self, version: int) -> Address:
        """The cluster address of IP version 4 or 6. Raises LabError when there is none."""
        return _of_version(version, self.cluster_addresses, f"Service {self.full_name}: cluster")

    def balanced_address(self, version: int) -> Address:
        """The load balancer's address of IP version 4 or 6. Raises LabError when there is none."""
        return _of_version(version, self.balanced_addresses, f"Service {self.full_name}: load balancer")

    @property
    def node_port(self) -> int:
        """The first port's port on the nodes."""
        return self.ports[0].node_port


def read_service(item: Object, written: Object | None = None) -> LabService:
    """Return a Service from its object, with the status that agents have written for it, if any."""
    key, spec = key_of(item), item["spec"]
    if written and written["metadata"].get("uid") == item["metadata"].get("uid"):
        item = {**item, "status": written["status"]}
    ingress = item.get("status", {}).get("loadBalancer", {}).get("ingress") or ()
    return LabService(
        namespace=key.namespace,
        name=key.name,
        type=spec["type"],
        cluster_addresses=_addresses(text for text in spec.get("clusterIPs") or () if text != "None"),
        external_addresses=_addresses(spec.get("externalIPs") or ()),
        balanced_addresses=_addresses(each["ip"] for each in ingress if "ip" in each),
        ports=tuple(
            ServicePort(each.get("name", ""), each["protocol"], each["port"], each.get("nodePort", 0))
            for each in spec.get("ports") or ()
        ),
    )


def _addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def _of_version(version: int, addresses: tuple[Address, ...], what: str) -> Address:
    for address in addresses:
        if address.version == version:
            return address
    raise LabError(f"{what}: there is no IPv{version} address")
