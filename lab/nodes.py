"""The lab's nodes as Kubernetes objects."""

from __future__ import annotations

import os

from lab.controllers import HOSTNAME
from lab.names import NodePlace
from lab.objects import Object
from lab.services import ZONE

ZONES = ("a", "b")
"""The lab's zones, in turn."""


def node_labels(place: NodePlace) -> dict[str, str]:
    """Return the labels that kubelet and the controllers of a cloud give a node."""
    return {
        HOSTNAME: place.name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": os.uname().machine,
        ZONE: ZONES[(place.number - 1) % len(ZONES)],
    }


def node_object(place: NodePlace) -> Object:
    """Return the Node as its kubelet and the controllers of a cloud would write it."""
    addresses = [{"type": "InternalIP", "address": str(address)} for address in place.addresses]
    cidrs = [str(cidr) for cidr in place.pod_cidrs]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": place.name, "uid": f"podwall-lab-{place.name}", "labels": node_labels(place)},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {
            "addresses": [*addresses, {"type": "Hostname", "address": place.name}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
