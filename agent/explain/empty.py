"""Why a Service has nobody behind it, in one sentence that names what to mend. Pure.

no selector --> are there EndpointSlices that somebody wrote?
selector    --> which Pods match, and why does none of them serve?
                none: which Pods come nearest, and which of their labels differ
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from agent.cluster.model import Pod, Service, ServicePort
from agent.compile.peers import named_ports
from agent.explain.world import World, title

MOST_NAMED = 3


class Empty(NamedTuple):
    """cause: a word for it. sentence: what is missing, and where."""

    cause: str
    sentence: str


def why_empty(world: World, service: Service, port: ServicePort) -> Empty:
    """Why a Service has no endpoint at a port."""
    if not service.selector:
        return Empty(
            "no-endpoints",
            f"{title(service)} has no selector, and no EndpointSlice has an address at its port {port.port}",
        )
    pods = list(world.snapshot.pods_in(service.namespace).values())
    matching = [pod for pod in pods if _matches(service.selector, pod.labels)]
    if not matching:
        return _no_match(world, service, pods)
    if isinstance(port.target_port, str) and not any(_declares(pod, port) for pod in matching):
        return _no_such_name(service, port, matching)
    return _not_serving(service, matching)


def undeclared(service: Service, port: ServicePort, pods: Iterable[Pod]) -> str:
    """What is odd about a targetPort that no container of these Pods declares; "" when nothing is."""
    number = port.target_port or port.port
    pods = [pod for pod in pods if pod.ports]
    if not pods or isinstance(number, str) or any(_has_port(pod, port, number) for pod in pods):
        return ""
    return (
        f"{title(service)} sends port {port.port} to targetPort {number}, which no container of its Pods "
        f"declares ({_declared(pods)}): unless something listens there unsaid, the Pod refuses"
    )


def _no_match(world: World, service: Service, pods: list[Pod]) -> Empty:
    wanted = _labels(service.selector or {})
    sentence = (
        f"no Pod of namespace {service.namespace} has the labels {wanted} that {title(service)} selects"
    )
    elsewhere = [pod for pod in world.snapshot.pods.values() if _matches(service.selector or {}, pod.labels)]
    near = _nearest(service.selector or {}, pods)
    if near is not None:
        sentence += f"; the nearest is {title(near)} with {_differing(service.selector or {}, near)}"
    elif elsewhere:
        sentence += f"; {title(elsewhere[0])} has them, but is in another namespace"
    return Empty("selector-mismatch", sentence)


def _nearest(selector: Mapping[str, str], pods: list[Pod]) -> Pod | None:
    """The Pod with the most of these labels, one with the right keys before one with none."""

    def score(pod: Pod) -> tuple[int, int]:
        right = sum(pod.labels.get(key) == value for key, value in selector.items())
        return right, sum(key in pod.labels for key in selector)

    best = max(sorted(pods, key=lambda pod: pod.name), key=score, default=None)
    return best if best is not None and score(best) > (0, 0) else None


def _differing(selector: Mapping[str, str], pod: Pod) -> str:
    wrong = [key for key, value in selector.items() if pod.labels.get(key) != value]
    return ", ".join(f"{key}={pod.labels[key]}" if key in pod.labels else f"no {key}" for key in wrong)


def _no_such_name(service: Service, port: ServicePort, pods: list[Pod]) -> Empty:
    return Empty(
        "target-port",
        f"{title(service)} sends port {port.port} to targetPort {port.target_port!r}, "
        f"a name that no container of its Pods declares ({_declared(pods)})",
    )


def _not_serving(service: Service, pods: list[Pod]) -> Empty:
    said = [f"{pod.name} {_state(pod)}" for pod in sorted(pods, key=lambda pod: pod.name)]
    more = f" and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
    return Empty(
        "not-ready",
        f"{title(service)} selects {len(pods)} Pod{'s' * (len(pods) > 1)}, but none is ready: "
        f"{', '.join(said[:MOST_NAMED])}{more}",
    )


def _state(pod: Pod) -> str:
    if pod.deleting:
        return "is being deleted"
    if not pod.node:
        return "is not scheduled yet"
    if pod.phase != "Running":
        return f"is {pod.phase}"
    return "is not Ready" if not pod.ready else "is Ready, but not in an EndpointSlice yet"


def _declares(pod: Pod, port: ServicePort) -> bool:
    return (port.protocol, port.target_port) in named_ports(pod.ports)


def _has_port(pod: Pod, port: ServicePort, number: int) -> bool:
    return any(each.protocol == port.protocol and each.port == number for each in pod.ports)


def _declared(pods: Iterable[Pod]) -> str:
    said = sorted({f"{of.name or of.protocol} {of.port}" for pod in pods for of in pod.ports})
    return f"they declare {', '.join(said)}" if said else "they declare no ports"


def _matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


def _labels(selector: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
