"""A connection as it is typed, SRC DST[:PORT] --protocol udp: the same wherever one is asked about."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypeAlias, TypeVar

import click

from agent.cli.names import WORKLOAD, Takes, completes
from agent.cluster.model import PROTOCOLS, Family, IPAddress, Protocol
from agent.explain.ends import WORKLOADS, ends_named, split_port
from agent.explain.pairs import Questions
from agent.explain.question import Question
from agent.explain.world import KINDS, UnknownNameError, World
from agent.log import printable

F = TypeVar("F", bound=Callable[..., Any])
Target: TypeAlias = tuple[str, int | str | None]
"""A name or address, and the port where one is said."""

PROTOCOL_NAMES: dict[str, Protocol] = {name.lower(): name for name in PROTOCOLS}
WORDS = {**KINDS, **WORKLOADS}
ENDS = ("Pod", "Service", "Node", WORKLOAD)
SOURCE = Takes(ENDS, WORDS)
TARGET = Takes(ENDS, WORDS, ports="all")
_FAMILIES: dict[str | None, Family] = {"4": 4, "6": 6}


class TargetType(click.ParamType[Target]):
    """`web:80`, `10.0.0.1:80`, `[::1]:80`, `::1`, `web:http`."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Target:
        """Take the port off. Raises click's usage error."""
        try:
            return split_port(str(value))
        except UnknownNameError as error:
            return self.fail(printable(str(error)), param, ctx)


def connection_options(command: F) -> F:
    """SRC, DST[:PORT] and the options that belong to them: `source`, `target`, `protocol`, `family`."""
    for add in (
        click.option(
            "--family", type=click.Choice(["4", "6"]), help="IPv4 or IPv6; else the first both ends have."
        ),
        click.option(
            "--protocol",
            type=click.Choice(list(PROTOCOL_NAMES), case_sensitive=False),
            default="tcp",
            show_default=True,
            help="The connection's protocol.",
        ),
        click.argument("target", metavar="DST[:PORT]", type=TargetType(), shell_complete=completes(TARGET)),
        click.argument("source", metavar="SRC", shell_complete=completes(SOURCE)),
    ):
        command = add(command)
    return command


def asked_about(
    world: World, namespace: str, *, source: str, target: Target, protocol: str, family: str | None
) -> Questions:
    """The question about it, of workloads about each of their Pods. Raises UnknownNameError."""
    name, port = target
    senders, receivers = ends_named(world, source, namespace), ends_named(world, name, namespace)
    first = Question(
        source=senders.ends[0],
        target=receivers.ends[0],
        port=port,
        protocol=PROTOCOL_NAMES[protocol.lower()],
        family=_FAMILIES.get(family),
        address=as_address(name),
    )
    return Questions(senders, receivers, first)


def as_address(text: str) -> IPAddress | None:
    """The address that a target is, when it is not a name."""
    try:
        return ip_address(text)
    except ValueError:
        return None
