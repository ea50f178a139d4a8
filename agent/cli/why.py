"""`podwall why SRC DST[:PORT]`: whether a connection is allowed, by what, and what would change it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import click

from agent.cli.cluster import Asked, cluster_options
from agent.cluster.model import Family, IPAddress, Protocol
from agent.explain.answer import Answer
from agent.explain.question import CannotAnswerError, Question
from agent.explain.way import why
from agent.explain.world import UnknownNameError, World
from agent.log import printable

_ENDS_WITH_PORT = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<plain>[^:\[\]]+))(?::(?P<port>[^:]+))?")
_PROTOCOLS: dict[str, Protocol] = {"tcp": "TCP", "udp": "UDP", "sctp": "SCTP"}
_FAMILIES: dict[str | None, Family] = {"4": 4, "6": 6}
_MARKS = {True: "ok", False: "no", None: "  "}


@click.command("why")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST[:PORT]")
@click.option("--protocol", type=click.Choice(["tcp", "udp", "sctp"], case_sensitive=False), default="tcp")
@click.option("--family", type=click.Choice(["4", "6"]), help="IPv4 or IPv6; else the first both ends have.")
@click.option("--exit-code", is_flag=True, help="End with 1 when the connection is denied.")
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text")
@cluster_options
def why_command(asked: Asked, source: str, target: str, **options: Any) -> None:
    """Say in one sentence whether SRC may connect to DST, then the way step by step.

    SRC and DST are Pods, Services, nodes, DNS names or addresses: web, shop/web, svc/web, node/worker,
    web.shop.svc.cluster.local, 203.0.113.10. A PORT is a number or a name; an IPv6 address with a port is
    written [ADDRESS]:PORT.
    """
    name, port = split_port(target)
    world = World(asked.snapshot())
    try:
        question = Question(
            source=world.named(source, asked.namespace),
            target=world.named(name, asked.namespace),
            port=port,
            protocol=_PROTOCOLS[options["protocol"]],
            family=_FAMILIES.get(options["family"]),
            address=as_address(name),
        )
        answer = why(world, question)
    except (UnknownNameError, CannotAnswerError) as error:
        raise click.UsageError(printable(str(error))) from error
    if options["output"] == "text":
        for line in lines(answer):
            click.echo(printable(line))
    else:
        click.echo(_structured(answer, options["output"]))
    if options["exit_code"] and not answer.allowed:
        raise SystemExit(1)


def split_port(text: str) -> tuple[str, int | str | None]:
    """A target and its port: `web:80`, `10.0.0.1:80`, `[::1]:80`, `::1`, `web:http`. Raises UsageError."""
    if text.count(":") > 1 and not text.startswith("["):
        return text, None  # an IPv6 address by itself
    found = _ENDS_WITH_PORT.fullmatch(text)
    if found is None:
        raise click.UsageError(f"{printable(text)} is no NAME, NAME:PORT or [ADDRESS]:PORT")
    port = found["port"]
    name = found["bracketed"] or found["plain"]
    if port is None or not port.isdecimal():
        return name, port
    if not 1 <= int(port) <= 65535:
        raise click.UsageError(f"port {port} is not from 1 to 65535")
    return name, int(port)


def as_address(text: str) -> IPAddress | None:
    """The address that a target is, when it is not a name."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def lines(answer: Answer) -> Iterator[str]:
    """The answer as a person reads it: the sentence first."""
    yield answer.sentence
    if answer.steps:
        yield ""
    for step in answer.steps:
        yield f"  {_MARKS[step.ok]}  {step.stage:<10} {step.text}"
    for change in answer.changes:
        yield ""
        yield "It would be allowed with:"
        yield from (f"  {line}" for line in change.text().splitlines())


def answer_json(answer: Answer) -> dict[str, Any]:
    """The whole answer as plain data."""
    return {
        "allowed": answer.allowed,
        "cause": answer.cause,
        "sentence": answer.sentence,
        "steps": [{"stage": step.stage, "ok": step.ok, "text": step.text} for step in answer.steps],
        "changes": [
            {"policy": "/".join(change.policy), "path": list(change.path), "add": change.value}
            for change in answer.changes
        ],
    }


def _structured(answer: Answer, output: str) -> str:
    content = answer_json(answer)
    if output == "json":
        return json.dumps(content, indent=2)
    import yaml  # noqa: PLC0415 - only this output needs it

    return str(yaml.safe_dump(content, sort_keys=False)).rstrip()
