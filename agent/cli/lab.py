"""`podwall lab`: a cluster without Kubernetes, in network namespaces of this machine.

What takes time tells what it is doing on standard error; answers go to standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from agent.cli.names import Takes, completes
from agent.cli.signals import handled
from lab import manifests, matrix, netns, state
from lab.expectation import Expected
from lab.exposed import LabService
from lab.names import Address
from lab.objects import ManifestError, key_of
from lab.probe import CONNECTED, TCP, UDP, Outcome, read_answer
from lab.world import Changes, Lab, LabError, LabPod, PodsError

PLACE = Takes(("Pod", "Node"), others=("outside",))
_INTERRUPTED = 130
_CANNOT_RUN = 126
_NO_COMMAND = 127

files = click.option(
    "-f",
    "--filename",
    "paths",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Manifests: a file or a directory; may be given several times.",
)
nodes_option = click.option("--nodes", default=2, show_default=True, help="How many nodes.")
vxlan_option = click.option("--vxlan", is_flag=True, help="Connect the nodes' Pods through VXLAN.")
routed_option = click.option("--routed", is_flag=True, help="Put each node into a subnet of its own.")
output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to say it.",
)


@click.group()
def lab() -> None:
    """A cluster without Kubernetes, in network namespaces of this machine."""
    if os.geteuid() != 0:
        raise click.ClickException("the lab makes network namespaces, which only root may: try with sudo")
    signals = handled(signal.SIGTERM, signal.SIGINT, by=_interrupt)
    click.get_current_context().with_resource(signals)


@lab.command()
@files
@nodes_option
@vxlan_option
@routed_option
def up(paths: Sequence[Path], nodes: int, vxlan: bool, routed: bool) -> None:
    """Start a lab with the objects in these manifests; it stays until `podwall lab down`.

    When one with the same nodes is up already, the manifests are applied to it.
    """
    with _errors():
        given = manifests.read(paths)
        wanted = Lab(nodes, mode=_mode(vxlan), routed=routed, progress=Console())
        running = state.read_settings()
        if running and running.complete:
            if not running.alike(wanted.settings):
                raise LabError(f"a lab with {_describe(running)} is up; first: podwall lab down")
            click.echo("the lab is up already: applying", err=True)
            _report(Lab.attach(Console()).apply(given))
        else:
            _report(wanted.up(given))


@lab.command()
@files
@click.option("--prune", is_flag=True, help="Remove the objects that are not in these manifests.")
def apply(paths: Sequence[Path], prune: bool) -> None:
    """Add and change the objects in these manifests; touches only what differs."""
    with _errors():
        _require(paths)
        _report(Lab.attach().apply(manifests.read(paths), prune=prune))


@lab.command()
@files
def delete(paths: Sequence[Path]) -> None:
    """Remove the objects in these manifests."""
    with _errors():
        _require(paths)
        _report(Lab.attach().delete(key_of(item) for item in manifests.read(paths)))


@lab.command()
def down() -> None:
    """Remove the lab, whatever state it is in."""
    with _errors():
        if not state.remains():
            click.echo("no lab is up", err=True)
            return
        Lab(progress=Console()).down()


@lab.command()
@files
@nodes_option
@vxlan_option
@routed_option
def demo(paths: Sequence[Path], nodes: int, vxlan: bool, routed: bool) -> None:
    """Start a lab, show who reaches whom, and remove it again."""
    with _errors():
        given = manifests.read(_require(paths))
        running = state.read_settings()
        if running and running.complete:
            raise LabError(
                "a lab is up; look at it with `podwall lab matrix`, or remove it: podwall lab down"
            )
        with Lab(nodes, mode=_mode(vxlan), routed=routed, progress=Console(), given=given) as made:
            good = _show_matrix(made, "table")
        if not good:
            sys.exit(1)


@lab.command("matrix")
@output_option
def matrix_command(output: str) -> None:
    """Connect every Pod and node to every Pod; ends with 1 when what is seen is not what is expected."""
    with _errors():
        if not _show_matrix(Lab.attach(), output):
            sys.exit(1)


@lab.command()
@output_option
def pods(output: str) -> None:
    """List the Pods."""
    with _errors():
        found = Lab.attach().pods()
    if output == "json":
        click.echo(json.dumps([_pod_json(pod) for pod in found], indent=2))
        return
    header = ("NAMESPACE", "NAME", "STATUS", "NODE", "ADDRESSES", "PORTS", "LINK")
    _table([header, *(_pod_row(pod) for pod in found)])
    for pod in found:
        if pod.message:
            click.echo(f"{pod.full_name}: {pod.message}", err=True)


@lab.command()
@output_option
def services(output: str) -> None:
    """List the Services and the addresses and ports by which they are reached."""
    with _errors():
        found = Lab.attach().services()
    if output == "json":
        click.echo(json.dumps([_service_json(service) for service in found], indent=2))
        return
    header = ("NAMESPACE", "NAME", "TYPE", "CLUSTER ADDRESSES", "EXTERNAL ADDRESSES", "PORTS")
    _table([header, *(_service_row(service) for service in found)])


@lab.command()
@click.argument("source", metavar="FROM", shell_complete=completes(PLACE, of_lab=True))
@click.argument(
    "target",
    metavar="TO:PORT",
    shell_complete=completes(
        Takes(("Service", *PLACE.bare), ports="numbers", others=PLACE.others), of_lab=True
    ),
)
@click.option("--times", default=1, show_default=True, help="How many connections, all at once.")
@click.option("--udp", is_flag=True, help="Datagrams instead of TCP connections.")
def connect(source: str, target: str, times: int, udp: bool) -> None:
    """Connect from a Pod, a node or "outside", and say who answered and whom it saw.

    TO is an address ([ADDRESS] with IPv6), or the name of a Service, a Pod, a node or "outside". Ends with 1
    when something was not answered.
    """
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal():
        raise click.UsageError(f"{target!r} is not TO:PORT, such as my-app:80 or [fd00:10:96::1]:80")
    good = True
    with _errors():
        made = Lab.attach()
        for address in _addresses_of(made, host):
            outcomes = made.ask(source, address, int(port), UDP if udp else TCP, times=times)
            good = good and all(outcome.verdict == CONNECTED for outcome in outcomes)
            click.echo(f"{address} port {port}")
            for text, count in Counter(map(_told, outcomes)).most_common():
                click.echo(f"  {count:>4}  {text}")
    if not good:
        sys.exit(1)


@lab.command()
def status() -> None:
    """Say what is there; ends with 1 when something of it is not as it should be."""
    with _errors():
        found = Lab.attach()
        click.echo(f"a lab with {_describe(found.settings)}")
        reasons = {name: agent.not_ready() for name, agent in found.agents.items()}
        for name, agent in found.agents.items():
            addresses = " ".join(str(address) for address in agent.node.addresses)
            alive = "ready" if not reasons[name] else "not ready" if agent.alive else "agent has ended"
            click.echo(f"  {name}  {addresses}  {alive}  log: {agent.log}")
        waiting = [pod for pod in found.pods() if pod.phase != "Running"]
        click.echo(f"  {len(found.pods())} Pods, {len(waiting)} not running")
    for reason in filter(None, reasons.values()):
        click.echo(f"  {reason}", err=True)
    if waiting or any(reasons.values()):
        sys.exit(1)


@lab.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("place", metavar="POD", shell_complete=completes(PLACE, of_lab=True))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def execute(place: str, command: tuple[str, ...]) -> NoReturn:
    """Run a command in the network of a Pod: NAMESPACE/NAME, or a node's name, or "outside".

    Only the network is the Pod's; files and users are this machine's.
    """
    with _errors():
        netns.enter(Lab.attach().netns(place))
    words = command[1:] if command[0] == "--" else command
    if not words:
        raise click.UsageError("which command? podwall lab exec POD -- COMMAND")
    _run(words)


def _run(command: tuple[str, ...]) -> NoReturn:
    """Become another program. Ends as shells do when it cannot be run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - the user's own command, its arguments untouched
    except FileNotFoundError:
        click.echo(f"podwall lab exec: {command[0]}: there is no such command", err=True)
        sys.exit(_NO_COMMAND)
    except OSError as error:
        click.echo(f"podwall lab exec: {command[0]}: {error.strerror}", err=True)
        sys.exit(_CANNOT_RUN)


class Console:
    """Shows what is being done and how long it took: rewritten in place on a terminal, else a line each."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def __call__(self, text: str, seconds: float | None) -> None:
        if seconds is not None:
            click.echo(f"{self._start()}✓ {text:<40} {seconds:5.2f} s", err=True)
        elif self._terminal:
            click.echo(f"{self._start()}… {text}", err=True, nl=False)

    def _start(self) -> str:
        return "\r\033[K" if self._terminal else ""


def _show_matrix(made: Lab, output: str) -> bool:
    """Try everything and show what was seen; whether it was as expected."""
    seen = made.matrix(Expected(made.objects().values()))
    missing = [pod.full_name for pod in made.pods() if pod.phase != "Running"]
    good = seen.good and not missing
    if output == "json":
        click.echo(json.dumps(_matrix_json(seen, good, missing), indent=1))
        return good
    click.echo(seen.render(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    for name in missing:
        click.echo(f"Pod {name} is not running (podwall lab pods says why)")
    return good


def _matrix_json(seen: matrix.Matrix, good: bool, missing: Sequence[str]) -> dict[str, object]:
    connections = [result.to_json() for result in seen.results]
    seconds = round(seen.seconds, 3)
    return {"ok": good, "seconds": seconds, "not_running": missing, "connections": connections}


def _report(changes: Changes) -> None:
    for note in changes.notes:
        click.echo(f"note: {note}", err=True)
    did = {
        "started": len(changes.started),
        "stopped": len(changes.stopped),
    }
    pods_did = ", ".join(f"{count} {word}" for word, count in did.items() if count) or "unchanged"
    click.echo(f"Pods: {pods_did}; other objects: {changes.changed or 'none'} changed", err=True)


def _pod_row(pod: LabPod) -> tuple[str, ...]:
    addresses = " ".join(str(address) for address in pod.addresses)
    ports = ",".join(str(port) for port in pod.ports)
    link = "(node)" if pod.host_network else pod.host_link
    return (pod.namespace, pod.name, pod.phase, pod.node or "-", addresses or "-", ports or "-", link or "-")


def _pod_json(pod: LabPod) -> dict[str, Any]:
    return {
        "namespace": pod.namespace,
        "name": pod.name,
        "uid": pod.uid,
        "status": pod.phase,
        "message": pod.message,
        "node": pod.node,
        "addresses": [str(address) for address in pod.addresses],
        "ports": list(pod.ports),
        "labels": dict(pod.labels),
        "host_network": pod.host_network,
        "link": pod.host_link,
        "container_id": pod.container_id,
        "netns": str(pod.netns),
    }


def _service_row(service: LabService) -> tuple[str, ...]:
    outer = (*service.external_addresses, *service.balanced_addresses)
    ports = (f"{each.port}/{each.protocol}" for each in service.ports if not each.node_port)
    on_nodes = (f"{each.port}:{each.node_port}/{each.protocol}" for each in service.ports if each.node_port)
    columns = (service.cluster_addresses, outer, (*ports, *on_nodes))
    return (
        service.namespace,
        service.name,
        service.type,
        *(" ".join(map(str, column)) or "-" for column in columns),
    )


def _service_json(service: LabService) -> dict[str, Any]:
    return {
        "namespace": service.namespace,
        "name": service.name,
        "type": service.type,
        "cluster_addresses": [str(address) for address in service.cluster_addresses],
        "external_addresses": [str(address) for address in service.external_addresses],
        "balanced_addresses": [str(address) for address in service.balanced_addresses],
        "ports": [dataclasses.asdict(port) for port in service.ports],
    }


def _addresses_of(made: Lab, host: str) -> Sequence[Address]:
    """Return what a name or an address stands for. Raises LabError."""
    try:
        return [ip_address(host.removeprefix("[").removesuffix("]"))]
    except ValueError:
        pass
    places = {place.name: place for place in (*made.nodes, made.outside)}
    if host in places:
        return places[host].addresses
    full_name = host if "/" in host else f"default/{host}"
    for service in made.services():
        if service.full_name == full_name and service.cluster_addresses:
            return service.cluster_addresses
    return made.pod(host).addresses


def _told(outcome: Outcome) -> str:
    answer = read_answer(outcome)
    if answer is None:
        return " ".join(filter(None, [outcome.verdict, outcome.error]))
    return f"{answer.pod} on {answer.reached} port {answer.reached_port}, asked by {answer.client}"


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _mode(vxlan: bool) -> str:
    return "vxlan" if vxlan else "auto"


def _describe(settings: state.Settings) -> str:
    shape = ", each in a subnet of its own" if settings.routed else ""
    return f"{settings.nodes} nodes{shape}, mode {settings.mode}"


def _require(paths: Sequence[Path]) -> Sequence[Path]:
    if not paths:
        raise click.UsageError("which manifests? Name them with -f FILE or -f DIRECTORY")
    return paths


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what went wrong into a sentence for the user."""
    try:
        yield
    except PodsError as error:
        raise click.ClickException(
            f"the lab is up, but some Pods are not as they should be:\n{error}"
        ) from error
    except (LabError, ManifestError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("\ninterrupted", err=True)
        sys.exit(_INTERRUPTED)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """End by the way that cleans up, and let nothing interrupt that again."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
