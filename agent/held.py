"""What this node's agent holds, in pages: Pods, Services, policies, Nodes and addresses, as plain data.

    {"what": "pods", "namespace": "", "name": "", "after": []}
       --> {"items": [...], "total": 40, "next": ["shop", "web-1", ...]}     more follow after that key
       --> {"items": [...], "total": 40, "next": null}                       that was all

It is what is in force on this node, which need not be what the API server says: a Pod's isolation is that of
its rules, a Service's endpoints are those that this node's rules lead to. A page has as much as fits into one
message on the socket; who asks on with `next` gets the rest, also when objects come and go meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from agent.calls import ROOM, Answer, Body, Room
from agent.cluster.model import Direction, IPAddress, NetworkPolicy, Node, Service
from agent.compile.policy import PolicyClass
from agent.compile.service import Backends
from agent.compile.service import served as is_served
from agent.config import Config
from agent.datapath import Datapath
from agent.loadbalancer.balancer import LoadBalancer
from agent.pods.attachments import Attachments
from agent.pods.model import Attachment
from agent.routes.plan import Plan
from agent.services import Services
from cni import spec
from cni.spec import CniError

MOST_ENDPOINTS = 1000
"""Endpoints that are listed of one Service's port; a page must have room for any Service."""

DIRECTIONS: tuple[Direction, ...] = ("Ingress", "Egress")

Key: TypeAlias = tuple[str, ...]
Describe: TypeAlias = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Holdings:
    """The parts of one agent that hold something; `plan` is asked for each time."""

    config: Config
    datapath: Datapath
    services: Services
    attachments: Attachments
    load_balancer: LoadBalancer | None
    plan: Callable[[], Plan]

    def of(self, what: str) -> Mapping[Key, Describe]:
        """Everything of a kind by its key, told only where it is asked for. Raises CniError."""
        match what:
            case "pods":
                return self._pods()
            case "services":
                return self._services()
            case "policies":
                return self._policies()
            case "nodes":
                nodes = self.datapath.store.snapshot.nodes
                return {(name,): partial(self._node, node) for name, node in nodes.items()}
            case "addresses":
                return self._addresses()
        raise CniError(spec.INVALID_CONFIG, f"{what!r} is none of pods, services, policies, nodes, addresses")

    # Pods

    def _pods(self) -> Mapping[Key, Describe]:
        there = [(each, "attached") for each in self.attachments.current.values()]
        there += [(each, "leaving") for each in self.attachments.leaving]
        return {
            (each.namespace, each.pod, each.container_id, each.ifname): partial(self._pod, each, state)
            for each, state in there
        }

    def _pod(self, pod: Attachment, state: str) -> dict[str, Any]:
        classes = self.datapath.policies.classes(pod.container_id, pod.ifname)
        enforced = [of for of in classes if not of.audit]
        return {
            "namespace": pod.namespace,
            "name": pod.pod,
            "uid": pod.pod_uid,
            "node": self.config.node_name,
            "state": state,
            "container": pod.container_id,
            "interface": pod.ifname,
            "link": pod.link,
            "addresses": list(map(str, pod.addresses)),
            "mac": pod.mac,
            "mtu": pod.mtu,
            "isolated": {
                direction.lower(): any(of.direction == direction for of in enforced)
                for direction in DIRECTIONS
            },
            "policies": _policies_of(enforced),
            "audited": _policies_of([of for of in classes if of.audit]),
            "host_ports": [
                {"protocol": each.protocol, "host_port": each.host_port, "port": each.container_port}
                for each in pod.port_mappings
            ],
        }

    # Services

    def _services(self) -> Mapping[Key, Describe]:
        problems, behind = self.services.problems(), self.services.rules.behind
        return {
            key: partial(self._service, service, problems.get(key, ()), ("service", *key) in behind)
            for key, service in self.datapath.store.snapshot.services.items()
        }

    def _service(self, service: Service, problems: Iterable[str], behind: bool) -> dict[str, Any]:
        state = self._state(service)
        lists = self.services.lists(service.key) if state == "served" else ()
        return {
            "namespace": service.namespace,
            "name": service.name,
            "type": service.type,
            "node": self.config.node_name,
            "state": "behind" if behind and state == "served" else state,
            "cluster_ips": list(map(str, service.cluster_ips)),
            "external_ips": list(map(str, service.external_ips)),
            "load_balancer": [str(each.ip or each.hostname) for each in service.load_balancer],
            "external_name": service.external_name,
            "ports": [
                {
                    "name": port.name,
                    "protocol": port.protocol,
                    "port": port.port,
                    "target_port": port.target_port,
                    "node_port": port.node_port or None,
                }
                for port in service.ports
            ],
            "endpoints": [_endpoints(each) for each in lists],
            "problems": [*map(str, service.problems), *problems],
        }

    def _state(self, service: Service) -> str:
        """What this node does for a Service: "served", or why nothing."""
        if not self.services.serving:
            return "off"
        if service.type == "ExternalName":
            return "external name"
        if service.headless:
            return "headless"
        return "served" if is_served(service) else "not served"

    # Policies

    def _policies(self) -> Mapping[Key, Describe]:
        selected = self.datapath.policies.selected()
        return {
            key: partial(self._policy, policy, selected.get(key, 0))
            for key, policy in self.datapath.store.snapshot.policies.items()
        }

    def _policy(self, policy: NetworkPolicy, pods: int) -> dict[str, Any]:
        state = self.datapath.policy_state(policy.key, pods)
        return {
            "namespace": policy.namespace,
            "name": policy.name,
            "node": self.config.node_name,
            "types": sorted(policy.policy_types),
            "mode": policy.mode,
            "generation": policy.generation,
            "in_force": state.in_force if state else None,
            "mode_in_force": state.mode_in_force if state else None,
            "waiting": state is None or state.waiting,
            "since": state.since if state else None,
            "pods": pods,
            "problems": list(map(str, policy.problems)),
        }

    # Nodes and addresses

    def _node(self, node: Node) -> dict[str, Any]:
        return {
            "name": node.name,
            "ready": node.ready,
            "internal_ips": list(map(str, node.internal_ips)),
            "pod_cidrs": list(map(str, node.pod_cidrs)),
            "paths": [
                {"cidr": str(path.cidr), "way": path.way}
                for path in self.plan().paths
                if path.node == node.name
            ],
            "problems": list(map(str, node.problems)),
        }

    def _addresses(self) -> Mapping[Key, Describe]:
        """The addresses of this node's Pods, and of the load balancer those that this node answers for."""
        there = [(each, "in use") for each in self.attachments.current.values()]
        there += [(each, "leaving") for each in self.attachments.leaving]
        held = [
            self._address(address, "Pod", str(each), state)
            for each, state in there
            for address in each.addresses
        ]
        announced = self.load_balancer.announced() if self.load_balancer else {}
        for service in self.datapath.store.snapshot.services.values() if announced else ():
            held += [
                self._address(each.ip, "Service", "/".join(service.key), "announced")
                for each in service.load_balancer
                if each.ip in announced
            ]
        return {(each["address"], each["owner"]): partial(dict, each) for each in held}

    def _address(self, address: IPAddress | None, kind: str, owner: str, state: str) -> dict[str, Any]:
        return {
            "address": str(address),
            "node": self.config.node_name,
            "kind": kind,
            "owner": owner,
            "state": state,
        }


def answers(holdings: Holdings) -> Mapping[str, Answer]:
    """The call `held`, by its name on the socket."""

    async def held(body: Body) -> object:
        return page(
            holdings.of(str(body.get("what", ""))),
            namespace=str(body.get("namespace", "")),
            name=str(body.get("name", "")),
            after=tuple(map(str, body.get("after") or ())),
        )

    return {"held": held}


def page(
    things: Mapping[Key, Describe], *, namespace: str = "", name: str = "", after: Key = (), room: int = ROOM
) -> dict[str, Any]:
    """As much of the things behind a key as there is room for; `next` is where to go on.

    Only those of a namespace and a name are told, where these are given; of what has no namespace the name
    is the key's first word.
    """
    keys = sorted(key for key in things if _is_asked(key, namespace, name))
    left = Room(room)
    items: list[dict[str, Any]] = []
    for key in keys[bisect_right(keys, after) if after else 0 :]:
        item = things[key]()
        if not left.takes(item) and items:
            return {"items": items, "total": len(keys), "next": list(after)}
        items.append(item)
        after = key
    return {"items": items, "total": len(keys), "next": None}


def _is_asked(key: Key, namespace: str, name: str) -> bool:
    if namespace and key[0] != namespace:
        return False
    return not name or name in key[:2]


def _policies_of(classes: Iterable[PolicyClass]) -> dict[str, list[str]]:
    """The policies of these classes by direction, as namespace/name."""
    classes = tuple(classes)
    return {
        direction.lower(): sorted(
            {"/".join(key) for of in classes if of.direction == direction for key in of.policies}
        )
        for direction in DIRECTIONS
    }


def _endpoints(of: Backends) -> dict[str, Any]:
    """One list of endpoints in force; its reach is "cluster", or "local": those of this node."""
    return {
        "port": of.port.port,
        "name": of.port.name,
        "protocol": of.port.protocol,
        "family": of.family,
        "reach": of.reach,
        "total": len(of.endpoints),
        "endpoints": [{"address": str(at), "port": port} for at, port in of.endpoints[:MOST_ENDPOINTS]],
    }
