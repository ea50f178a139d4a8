"""What kubelet does for a Pod, as far as the network goes: sandbox, server, status; and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import netns, serving
from lab.controllers import container_ports, sctp_ports
from lab.manifests import ObjectDirectory
from lab.names import Address, NodePlace, pod_netns
from lab.objects import Object, key_of, timestamp
from lab.probe import has_sctp
from lab.processes import LabError
from lab.runtime import PluginError, Runtime

Failure = (LabError, PluginError, OSError)
"""What starting or stopping a Pod may raise."""


class Kubelet:
    """All nodes' kubelets. Its methods may be called from several threads, one for each Pod."""

    def __init__(self, runtimes: Mapping[str, Runtime], cluster: ObjectDirectory) -> None:
        """Use each node's runtime, by its name, and tell the cluster how the Pods are."""
        self._runtimes = runtimes
        self._cluster = cluster

    def start(self, pod: Object) -> None:
        """Start a Pod; one without a node stays Pending. Raises LabError, PluginError or OSError."""
        self._cluster.write({**pod, "status": {"phase": "Pending"}})
        runtime = self._runtimes.get(pod["spec"].get("nodeName", ""))
        if runtime is None:
            return
        try:
            where, addresses = self._connect(pod, runtime)
            if ports := container_ports(pod):
                sctp = sctp_ports(pod)
                serving.serve(_full_name(pod), where, ports, sctp if sctp and has_sctp() else ())
        except Failure as error:
            self._cluster.write({**pod, "status": {"phase": "Pending", "message": str(error)}})
            raise
        self._cluster.write({**pod, "status": _running(runtime.node, addresses)})

    def stop(self, pod: Object) -> None:
        """Stop a Pod and forget it; it stays, Terminating, when that fails. Raises as start does."""
        self.begin_to_end(pod)
        serving.stop(_full_name(pod))
        runtime = self._runtimes.get(pod["spec"].get("nodeName", ""))
        key = key_of(pod)
        for box in list(runtime.sandboxes()) if runtime else ():
            if runtime and (box.namespace, box.pod) == (key.namespace, key.name):
                runtime.stop(box)
        self._cluster.remove(key)

    def begin_to_end(self, pod: Object) -> None:
        """Write that a Pod is about to be stopped; until then it goes on."""
        metadata = {**pod["metadata"], "deletionTimestamp": timestamp()}
        self._cluster.write({**pod, "metadata": metadata})

    def set_ready(self, pod: Object, ready: bool) -> None:
        """Write what a Pod's readiness probe would have found."""
        others = [each for each in pod["status"]["conditions"] if each["type"] != "Ready"]
        conditions = [*others, {"type": "Ready", "status": str(ready)}]
        self._cluster.write({**pod, "status": {**pod["status"], "conditions": conditions}})

    def update(self, pod: Object) -> None:
        """Write a Pod whose labels or annotations changed."""
        self._cluster.write(pod)

    def _connect(self, pod: Object, runtime: Runtime) -> tuple[Path, Sequence[Address]]:
        if pod["spec"].get("hostNetwork"):
            return netns.path(runtime.node.netns), runtime.node.addresses
        key = key_of(pod)
        for box in list(runtime.sandboxes()):
            if (box.namespace, box.pod) == (key.namespace, key.name):
                runtime.stop(box)  # left by an attempt that was killed
        box = runtime.run(pod_netns(key.namespace, key.name), pod)
        return box.path, box.addresses


def _running(node: NodePlace, addresses: Sequence[Address]) -> Object:
    return {
        "phase": "Running",
        "conditions": [{"type": name, "status": "True"} for name in ("PodScheduled", "Initialized", "Ready")],
        "hostIP": str(node.addresses[0]),
        "hostIPs": [{"ip": str(address)} for address in node.addresses],
        "podIP": str(addresses[0]),
        "podIPs": [{"ip": str(address)} for address in addresses],
    }


def _full_name(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
