"""What tests of Services in the lab share: objects, answers counted, conditions that are awaited."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lab import manifests, probe
from lab.limits import SLOWNESS
from lab.names import Address
from lab.objects import Object, check
from lab.probe import TCP, Answer
from lab.world import Lab

EXAMPLES = Path(__file__).parents[2] / "examples" / "services"
FAMILIES = (4, 6)
SOON = 0.3
"""Seconds of silence that are enough where one asks again."""

LIMIT = 5.0 * SLOWNESS
"""Seconds until what was applied must be in force; agents look at the lab's files every 50 ms."""

POLL = 0.01
T = TypeVar("T")


def example(*names: str) -> list[Object]:
    """The objects of files of the example."""
    return list(manifests.read([EXAMPLES / f"{name}.yaml" for name in names]))


def port(number: int, target: int | str = 8080, **more: Any) -> dict[str, Any]:
    """One port of a Service."""
    return {
        "name": f"{more.get('protocol', TCP).lower()}-{number}",
        "port": number,
        "targetPort": target,
        **more,
    }


def service(
    path: str, selector: Mapping[str, str] | None = None, *ports: Mapping[str, Any], **spec: Any
) -> Object:
    """A Service `namespace/name` of both families; without ports 80 to 8080, TCP and UDP."""
    space, name = path.split("/")
    given = [dict(each) for each in ports] or [port(80), port(80, protocol="UDP")]
    whole = {"ipFamilyPolicy": "PreferDualStack", "ports": given, **spec}
    if selector is not None:
        whole["selector"] = dict(selector)
    meta = {"namespace": space, "name": name}
    return check({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": whole}, "test")


def eventually(ask: Callable[[], T], good: Callable[[T], bool], seconds: float = LIMIT) -> T:
    """What was seen when it was good for the first time; the last when it was not in time."""
    deadline = time.monotonic() + seconds
    while True:
        seen = ask()
        if good(seen) or time.monotonic() > deadline:
            return seen
        time.sleep(POLL)


def until(ask: Callable[[], T], seconds: float = LIMIT, why: str = "it is not so in time") -> T:
    """What was seen when it was true for the first time; AssertionError when it was not in time."""
    seen = eventually(ask, bool, seconds)
    assert seen, why
    return seen


def answers(
    lab: Lab,
    source: str,
    address: Address,
    number: int,
    protocol: str = TCP,
    *,
    times: int = 1,
    own: Address | None = None,
    quiet: float = probe.QUIET,
) -> list[Answer | None]:
    """What so many connections at once were told; None for each that was not answered."""
    outcomes = lab.ask(source, address, number, protocol, times=times, own=own, quiet=quiet)
    return [probe.read_answer(outcome) for outcome in outcomes]


def wait_for_frontends(lab: Lab, *names: str) -> None:
    """Wait until every node translates what is sent to the cluster addresses of these Services.

    To ask them before would leave connections that are tracked without a translation for two minutes, and a
    client that asks often enough comes back to one of their ports meanwhile.
    """
    for name in names:
        found = lab.service(name)
        for node in lab.nodes:
            for address in found.cluster_addresses:
                frontends = ["nft", "list", "map", "inet", "podwall_services", f"frontends{address.version}"]
                listed = eventually(
                    lambda: lab.run(node.name, frontends).stdout,  # noqa: B023 - called at once
                    lambda text: f"{address} ." in text,  # noqa: B023
                )
                assert f"{address} ." in listed, f"{node.name} does not translate {address}"


@dataclass(frozen=True)
class Asking:
    """Connections to try: from whom to which address and port, and from which own address if not any."""

    source: str
    address: Address
    port: int
    own: Address | None = None
    protocol: str = TCP


def pods_answering(lab: Lab, asked: Sequence[Asking], times: int = 1) -> list[set[str]]:
    """Which Pods answer each, so many times; "" for nobody. Silence is waited for once, for all together."""
    probes = [
        probe.Probe(lab.netns(each.source), each.address, each.port, each.protocol, each.own, b"all")
        for each in asked
        for _ in range(times)
    ]
    found = [probe.read_answer(outcome) for outcome in probe.run(probes)]
    return [set(pods_of(found[start : start + times])) for start in range(0, len(found), times)]


def pods_of(found: list[Answer | None]) -> Counter[str]:
    """How often each Pod answered; "" for who did not."""
    return Counter(answer.pod if answer else "" for answer in found)


def named(lab: Lab, prefix: str) -> set[str]:
    """The full names of the Pods whose full name starts so."""
    return {pod.full_name for pod in lab.pods() if pod.full_name.startswith(prefix)}


def of_version(addresses: tuple[Address, ...], version: int) -> Address:
    """The address of IP version 4 or 6."""
    return next(address for address in addresses if address.version == version)
