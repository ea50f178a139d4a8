"""A lab's Pod as tests and the command see it: the object, and what is known of its sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from lab import names, netns
from lab.controllers import container_ports, sctp_ports
from lab.names import Address
from lab.objects import Object, key_of
from lab.processes import LabError
from lab.runtime import Runtime, Sandbox


@dataclass(frozen=True, slots=True)
class LabPod:
    """A Pod that there shall be, and what is known of it; a Pending one has no addresses."""

    namespace: str
    name: str
    uid: str
    node: str
    phase: str
    netns: Path
    addresses: tuple[Address, ...]
    ports: tuple[int, ...]
    sctp_ports: tuple[int, ...]
    host_network: bool
    host_link: str
    container_id: str
    labels: Mapping[str, str]
    message: str

    @property
    def full_name(self) -> str:
        """Namespace and name, as the Pod itself answers."""
        return f"{self.namespace}/{self.name}"

    def address(self, version: int) -> Address:
        """The address of IP version 4 or 6. Raises LabError when there is none."""
        for address in self.addresses:
            if address.version == version:
                return address
        raise LabError(f"Pod {self.full_name} has no IPv{version} address; it is {self.phase}")


def read_pod(
    item: Object, boxes: Mapping[tuple[str, str], Sandbox], runtimes: Mapping[str, Runtime]
) -> LabPod:
    """Return a Pod from its object, all sandboxes by namespace and name, and the nodes' runtimes."""
    key, spec, status = key_of(item), item["spec"], item.get("status", {})
    box = boxes.get((key.namespace, key.name))
    runtime = runtimes.get(spec.get("nodeName", "")) if spec.get("hostNetwork") else None
    where = runtime.node.netns if runtime else names.pod_netns(key.namespace, key.name)
    ending = "deletionTimestamp" in item["metadata"]
    return LabPod(
        namespace=key.namespace,
        name=key.name,
        uid=item["metadata"].get("uid", ""),
        node=spec.get("nodeName", ""),
        phase="Terminating" if ending else status.get("phase", "Pending"),
        netns=netns.path(where),
        addresses=tuple(ip_address(entry["ip"]) for entry in status.get("podIPs", ())),
        ports=container_ports(item),
        sctp_ports=sctp_ports(item),
        host_network=runtime is not None,
        host_link=box.host_link if box else "",
        container_id=box.container_id if box else "",
        labels=item["metadata"].get("labels") or {},
        message=status.get("message", ""),
    )
