"""Whom a name means where many are meant: Pods by their workload, and the ports of targets. Pure.

    shop/web            the Pod of this name, else all Pods of the Deployment, StatefulSet, ... of this name
    pod/shop/web, deploy/shop/web, ...     only that
    shop/*, */*         all Pods of a namespace, of all namespaces
    svc/shop/web        a Service;  node/worker a node;  203.0.113.10 whoever has the address

Where one end is meant, a Pod, Service, node or address of this name comes before the workload's Pods.
A target may be followed by :PORT, a number or a name; an IPv6 address with a port is written [ADDRESS]:PORT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NamedTuple

from agent.cluster.model import Owner, Pod, Protocol, Service
from agent.explain.matrix import Column, columns_of
from agent.explain.world import KINDS, End, NobodyError, UnknownNameError, World, title

ALL = "*"
WORKLOADS = {
    "deploy": "Deployment",
    "deployment": "Deployment",
    "deployments": "Deployment",
    "sts": "StatefulSet",
    "statefulset": "StatefulSet",
    "statefulsets": "StatefulSet",
    "ds": "DaemonSet",
    "daemonset": "DaemonSet",
    "daemonsets": "DaemonSet",
    "rs": "ReplicaSet",
    "replicaset": "ReplicaSet",
    "replicasets": "ReplicaSet",
    "job": "Job",
    "jobs": "Job",
}
"""The words that kubectl knows workloads by."""

_TEMPLATE_HASH = "pod-template-hash"
_WITH_PORT = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<plain>[^:\[\]]+))(?::(?P<port>[^:]+))?")


class Workload(NamedTuple):
    """What made a Pod and its replicas; a Pod that nothing made is its own (kind Pod)."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Meant:
    """Whom a name means: one end, or the Pods of a workload, in order of names."""

    ends: tuple[End, ...]
    workload: Workload | None = None


def workload_of(pod: Pod) -> Workload:
    """A Deployment's Pods are its ReplicaSet's, whose name ends in the hash that they are labelled with."""
    owner = _owner_of(pod)
    if owner is None:
        return Workload("Pod", pod.namespace, pod.name)
    template = pod.labels.get(_TEMPLATE_HASH)
    if owner.kind == "ReplicaSet" and template and owner.name.endswith(f"-{template}"):
        return Workload("Deployment", pod.namespace, owner.name.removesuffix(f"-{template}"))
    return Workload(owner.kind, pod.namespace, owner.name)


def takes_part(pod: Pod) -> bool:
    """Whether it can send and receive: it has not ended and has an address."""
    return not pod.finished and bool(pod.ips)


def ends_named(world: World, text: str, namespace: str) -> Meant:
    """What has this name, else the Pods of the workload that has it. Raises UnknownNameError."""
    try:
        return Meant((world.named(text, namespace),))
    except NobodyError:
        kind, space, name = _split(text, namespace)
        there = [pod for _, pod in sorted(world.snapshot.pods_in(space).items())]
        made = [pod for pod in there if _maker(pod, kind, name)]
        if not made and kind not in WORKLOADS.values():
            raise
    found = tuple(pod for pod in made if takes_part(pod))
    _refuse_several(text, found or made)
    if not found:
        raise UnknownNameError(_nobody(world, text, kind, space, name))
    return Meant(found, _maker(found[0], kind, name))


def pods_named(world: World, text: str, namespace: str) -> tuple[Pod, ...]:
    """Those that can send and receive, in order of names. Raises UnknownNameError when there are none."""
    kind, space, name = _split(text, namespace)
    there = world.snapshot.pods if space == ALL else world.snapshot.pods_in(space)
    alive = [pod for _, pod in sorted(there.items()) if takes_part(pod)]
    if name == ALL and kind in ("", "Pod"):
        found = alive
    else:
        found = [pod for pod in alive if pod.name == name and kind in ("", "Pod")]
        found = found or [pod for pod in alive if _maker(pod, kind, name)]
    if not found:
        raise UnknownNameError(_nobody(world, text, kind, space, name))
    if ALL not in (space, name):
        _refuse_several(text, found)
    return tuple(found)


def columns_named(
    world: World,
    text: str,
    namespace: str,
    *,
    port: int | str | None = None,
    protocol: Protocol | None = None,
) -> tuple[Column, ...]:
    """The ports of a target; `port` where the text says none. Raises UnknownNameError when there are none."""
    name, said = split_port(text)
    port = port if said is None else said
    end = _single(world, name, namespace)
    if end is None:
        found = columns_of(pods_named(world, name, namespace), port=port, protocol=protocol)
    elif isinstance(end, Pod):
        found = columns_of((end,), port=port, protocol=protocol)
    elif isinstance(end, Service):
        found = tuple(_of_service(end, port, protocol))
    elif isinstance(port, int):
        found = (Column(end, protocol or "TCP", port),)
    else:
        raise UnknownNameError(f"which port of {title(end)}? Write it as NAME:PORT")
    if not found:
        raise UnknownNameError(_no_ports(text, port, protocol))
    return found


def split_port(text: str) -> tuple[str, int | str | None]:
    """A target and its port, a number or a name. Raises UnknownNameError."""
    if text.count(":") > 1 and not text.startswith("["):
        return text, None  # an IPv6 address by itself
    found = _WITH_PORT.fullmatch(text)
    if found is None:
        raise UnknownNameError(f"{text!r} is no NAME, NAME:PORT or [ADDRESS]:PORT")
    name = found["bracketed"] or found["plain"]
    return name, port_of(found["port"]) if found["port"] else None


def port_of(text: str) -> int | str:
    """A port by its number or name. Raises UnknownNameError."""
    if not (text.isascii() and text.isdecimal()):
        return text
    if len(text) > 5 or not 1 <= int(text) <= 65535:
        raise UnknownNameError(f"port {text} is not from 1 to 65535")
    return int(text)


def _split(text: str, namespace: str) -> tuple[str, str, str]:
    """Kind ("" for any), namespace and name."""
    head, _, rest = text.partition("/")
    words = {**KINDS, **WORKLOADS}
    kind = words.get(head.lower(), "") if rest else ""
    space, slash, name = (rest if kind else text).partition("/")
    return (kind, space, name) if slash else (kind, namespace, space)


def _owner_of(pod: Pod) -> Owner | None:
    """What controls a Pod; one that the kubelet has from a file belongs to its node, which is no workload."""
    return next((each for each in pod.owners if each.controller and each.kind != "Node"), None)


def _maker(pod: Pod, kind: str, name: str) -> Workload | None:
    """The workload of this name that made a Pod: a Deployment, or the ReplicaSet in between."""
    owner = _owner_of(pod)
    if owner is None:
        return None
    makers = workload_of(pod), Workload(owner.kind, pod.namespace, owner.name)
    return next((each for each in makers if each.name == name and kind in ("", each.kind)), None)


def _refuse_several(text: str, found: Iterable[Pod]) -> None:
    """Raises UnknownNameError for Pods of more than one workload."""
    if len(made := {workload_of(pod)[::2] for pod in found}) > 1:
        kinds = ", ".join(sorted(f"{of[0]} {of[1]}" for of in made))
        raise UnknownNameError(f"{text!r} may be {kinds}: put deploy/, sts/, ds/, ... before it")


def _single(world: World, name: str, namespace: str) -> End | None:
    """A Service, a node, or whoever has an address; None for a name of Pods."""
    try:
        return world.at(ip_address(name))
    except ValueError:
        pass
    kind, _, _ = _split(name, namespace)
    return world.named(name, namespace) if kind in ("Service", "Node") else None


def _of_service(service: Service, port: int | str | None, protocol: Protocol | None) -> Iterator[Column]:
    if not service.cluster_ips:
        raise UnknownNameError(f"{title(service)} has no address of its own: name its Pods")
    for each in service.ports:
        if protocol in (None, each.protocol) and port in (None, each.port, each.name):
            yield Column(service, each.protocol, each.port)


def _nobody(world: World, text: str, kind: str, space: str, name: str) -> str:
    if space not in (ALL, *world.snapshot.namespaces, *world.snapshot.pods_by_namespace):
        return f"{text!r}: there is no namespace {space}"
    if (pod := world.snapshot.pods.get((space, name))) is not None and kind in ("", "Pod"):
        return f"{title(pod)} {'has ended' if pod.finished else 'has no address yet'}"
    made = {pod.key: of for pod in world.snapshot.pods.values() if (of := _maker(pod, kind, name))}
    if here := [of for of in made.values() if of.namespace == space]:
        return f"no Pod of {here[0]} can take part: {_waiting(world, space, made)}"
    if made:
        there = ", ".join(sorted(set(map(str, made.values()))))
        return f"{text!r} has no Pods in namespace {space}, but there is {there}"
    if (space, name) in world.snapshot.services:
        return f"{text!r} is no Pod or workload; for the Service write svc/{space}/{name}"
    what = kind if kind in WORKLOADS.values() else "Pod or workload"
    return f"{text!r} is no {what} with Pods in namespace {space}"


def _waiting(world: World, space: str, made: Iterable[tuple[str, str]]) -> str:
    pods = [world.snapshot.pods[key] for key in made if key[0] == space]
    ended = sum(pod.finished for pod in pods)
    said = {"without an address yet": len(pods) - ended, "ended": ended}
    return ", ".join(f"{count} {what}" for what, count in said.items() if count)


def _no_ports(text: str, port: int | str | None, protocol: Protocol | None) -> str:
    what = f"{protocol or ''} port".strip()
    if port is None:
        return f"{text!r} declares no {what}: write it as NAME:PORT"
    return f"{text!r} has no {what} {port}"


def distinct(columns: Iterable[Column]) -> tuple[Column, ...]:
    """Each port of each target once, in the order they come."""
    found: dict[tuple[str, str, int], Column] = {}
    for each in columns:
        found.setdefault((title(each.target), each.protocol, each.port), each)
    return tuple(found.values())
