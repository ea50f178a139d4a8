"""`podwall bugreport`: everything that helps to find a fault, in one archive, without secrets.

    each node's agent   --parts, page by page--+
    API server or lab   --objects, logs--------+--> lines --agent.redaction--> members --> FILE.tar.gz
    podwall doctor      --findings-------------+

One line at a time goes through, so memory does not grow with the cluster. The archive grows in a file beside
the target and takes its name at the end; whatever interrupts it, that file goes.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import signal
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn
from urllib.parse import quote

import click

from agent.cli.agents import SELECTOR, Agents, SilentError
from agent.cli.ask import Unreachable
from agent.cli.cluster import Asked, listed, live_cluster_options
from agent.cli.signals import handled
from agent.cluster.client import ApiClient
from agent.cluster.errors import ApiError
from agent.log import printable
from agent.redaction import kept, lines

CALLS = ("status", "doctor", "policies", "denials")
PARTS = (
    "rules",
    "foreign-chains",
    "links",
    "addresses",
    "routes",
    "sysctls",
    "counters",
    "configuration",
)
LOG_LINES, LOG_BYTES = 2000, 4 << 20
AT_ONCE = 4
SPOOLED = 1 << 20
"""Bytes of a member that are held in memory; more of it waits in a file without a name."""

OBJECTS = {
    "Node": "/api/v1/nodes",
    "Namespace": "/api/v1/namespaces",
    "Pod": "/api/v1/pods",
    "Service": "/api/v1/services",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/networkpolicies",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "Event": "/api/v1/namespaces/kube-system/events",
    "DaemonSet": "/apis/apps/v1/namespaces/kube-system/daemonsets",
    "ConfigMap": "/api/v1/namespaces/kube-system/configmaps?fieldSelector=metadata.name%3Dpodwall",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
    "?labelSelector=app.kubernetes.io%2Fname%3Dpodwall",
}
"""What is asked of the API server, each kind by its path. Secrets are not among them."""

README = """\
podwall {version}, bug report of {when}

findings.json           what `podwall doctor` says
objects/KIND.jsonl      the cluster's objects, one a line, with the fields that podwall reads and a few more
                        (of the lab: all.jsonl)
nodes/NODE/*.json       what the node's agent says: status, doctor's facts, policies in force, denied packets,
                        flows.json how many flows there are by protocol (no flow itself)
nodes/NODE/rules.txt    podwall's nftables tables, an object a line; foreign-chains.txt the chains of others
nodes/NODE/*.txt        links, addresses, routes, kernel settings and counters, the agent's configuration
nodes/NODE/log.txt      the last {log_lines} lines of the agent's log; log-previous.txt: of its forerunner's
missing.txt             what could not be had, and why; not there when all could

Left out: Secrets are not read, nor is anybody's environment, command line or volume; annotations that podwall
does not read lose their value. What looks like a password, token, key, certificate or credential anywhere
became (removed). Names of objects, labels, addresses and the texts of policies are in it: look through it
before you give it to others.
"""


@click.command("bugreport")
@click.option(
    "-O",
    "--output-file",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The archive; else podwall-bugreport-TIME.tar.gz here.",
)
@live_cluster_options
def bugreport(asked: Asked, target: Path | None) -> None:
    """Gather everything that helps to find a fault into one archive, without secrets.

    \b
    podwall bugreport                                        a file in this directory
    podwall bugreport -O /tmp/r.tar.gz                       this file
    tar -xOzf /tmp/r.tar.gz podwall-bugreport/README.txt     what is in it

    Nothing else is written, here or in the cluster, also when it is interrupted. What cannot be read is named
    in the archive, and the rest is there.
    """
    target = target or Path(time.strftime("podwall-bugreport-%Y%m%d-%H%M%S.tar.gz"))
    with asked.agents() as agents, _archive(target) as archive:
        gather(asked, agents, archive)
        missing = archive.missing()
    click.echo(f"{printable(str(target))}: {target.stat().st_size / 1024:.0f} KiB, {len(agents.nodes)} nodes")
    for each in missing:
        click.echo(printable(f"missing: {each}"), err=True)


class Archive:
    """Members of a tar file, each written as lines; several threads may write."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w:gz")  # noqa: SIM115 - closed by whoever made it
        self._turn = threading.Lock()
        self._missing: list[str] = []
        self._when = time.time()

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Write a member; what goes wrong while its lines are read is named as missing."""
        with tempfile.SpooledTemporaryFile(SPOOLED) as spool:
            try:
                for line in lines(texts):
                    spool.write(line.encode(errors="replace") + b"\n")
            except (SilentError, ApiError, OSError, ValueError, zlib.error) as error:
                self.miss(name, error)
            self._write(name, spool)

    def add_json(self, name: str, get: Callable[[], object]) -> None:
        """Write a member of plain data."""
        self.add(name, _as_json(get))

    def missing(self) -> list[str]:
        """What could not be had, and why; written too."""
        told = sorted(self._missing)
        self.add("missing.txt", told)
        return told

    def close(self) -> None:
        """Write the end."""
        self._tar.close()

    def miss(self, name: str, error: Exception) -> None:
        """Say that something could not be had."""
        with self._turn:
            self._missing.append(next(lines([f"{name}: {error}"])))

    def _write(self, name: str, spool: IO[bytes]) -> None:
        member = tarfile.TarInfo(f"podwall-bugreport/{name}")
        member.size, member.mtime, member.mode = spool.tell(), int(self._when), 0o600
        spool.seek(0)
        if member.size:
            with self._turn:
                self._tar.addfile(member, spool)


def _as_json(get: Callable[[], object]) -> Iterator[str]:
    yield from json.dumps(get(), indent=1).splitlines()


@contextmanager
def _archive(target: Path) -> Iterator[Archive]:
    """An archive that is whole under its name, or not there; a signal leaves nothing either."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with _removed_by_signals(temporary):
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise click.UsageError(f"{target} cannot be written: {error.strerror}; -O FILE") from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                archive = Archive(file)
                yield archive
                archive.close()
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _removed_by_signals(temporary: Path) -> Iterator[None]:
    """A signal ends the command at once, whatever its threads wait for, and the file before."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        temporary.unlink(missing_ok=True)
        os.write(sys.stderr.fileno(), b"interrupted; nothing is left\n")
        os._exit(128 + number)

    with handled(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, by=end):
        yield


# What is gathered


def gather(asked: Asked, agents: Agents, archive: Archive) -> None:
    """Write every member; each node's and each kind's come as they come."""
    client = asked.client()
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    told = README.format(version=version("podwall"), when=when, log_lines=LOG_LINES)
    archive.add("README.txt", told.splitlines())
    archive.add_json("findings.json", lambda: _findings(asked))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        work = [threads.submit(_node, agents, archive, node) for node in agents.nodes]
        if client:
            work.append(threads.submit(_of_api, client, archive))
        else:
            work.append(threads.submit(_of_lab, archive, agents.nodes))
        for each in work:
            each.result()
    if client:
        client.close()


def _findings(asked: Asked) -> object:
    from agent.cli.doctor import examine  # noqa: PLC0415 - only here

    try:
        return [each.to_json() for each in examine(asked)[0]]
    except Unreachable as error:
        raise ValueError(error.message) from error


def _node(agents: Agents, archive: Archive, node: str) -> None:
    for call in CALLS:
        archive.add_json(f"nodes/{node}/{call}.json", lambda call=call: agents.ask(node, call))  # type: ignore[misc]
    archive.add_json(f"nodes/{node}/flows.json", lambda: _flows(agents, node))
    for part in PARTS:
        archive.add(f"nodes/{node}/{part}.txt", pages(agents, node, part))


def _flows(agents: Agents, node: str) -> object:
    found = agents.ask(node, "flows")
    by_protocol: dict[str, int] = {}
    for each in found["flows"]:
        by_protocol[each["protocol"]] = by_protocol.get(each["protocol"], 0) + 1
    return {"total": found["total"], "counted": len(found["flows"]), "by_protocol": by_protocol}


def pages(agents: Agents, node: str, part: str) -> Iterator[str]:
    """The lines of a part of a node, of which one page is in memory. Raises SilentError, zlib.error."""
    body: dict[str, object] = {"part": part, "at": 0}
    unpacker, rest = zlib.decompressobj(), b""
    while True:
        page = agents.ask(node, "bugreport", body)
        packed = base64.b64decode(page["data"])
        while packed:
            *whole, rest = (rest + unpacker.decompress(packed, SPOOLED)).split(b"\n")
            packed = unpacker.unconsumed_tail
            yield from (line.decode(errors="replace") for line in whole)
        if page["next"] is None:
            break
        body = {"part": part, "at": page["next"], "of": page["of"]}
    if rest := rest + unpacker.flush():
        yield rest.decode(errors="replace")


# A cluster


def _of_api(client: ApiClient, archive: Archive) -> None:
    archive.add_json("versions.json", lambda: {"podwall": version("podwall"), "kubernetes": client.version()})
    for kind, path in OBJECTS.items():
        archive.add(f"objects/{kind}.jsonl", _told(kind, listed(client, path)))
    for pod in _agents_pods(client, archive):
        _logs(client, archive, pod)


def _told(kind: str, items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        if (told := kept(item, kind)) is not None:
            yield json.dumps(told)


def _agents_pods(client: ApiClient, archive: Archive) -> list[Any]:
    try:
        return list(listed(client, f"/api/v1/pods?labelSelector={quote(SELECTOR)}"))
    except ApiError as error:
        archive.miss("logs", error)
        return []


def _logs(client: ApiClient, archive: Archive, pod: Any) -> None:
    meta, node = pod["metadata"], pod["spec"].get("nodeName", "unscheduled")
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/log?container=agent"
    archive.add(f"nodes/{node}/log.txt", _log(client, f"{path}&tailLines={LOG_LINES}&limitBytes={LOG_BYTES}"))
    states = pod["status"].get("containerStatuses", ())
    if any(each["name"] == "agent" and each.get("restartCount") for each in states):
        name = f"nodes/{node}/log-previous.txt"
        archive.add(name, _log(client, f"{path}&tailLines={LOG_LINES}&limitBytes={LOG_BYTES}&previous=true"))


def _log(client: ApiClient, path: str) -> Iterator[str]:
    yield from io.StringIO(client.read_text(path))


# The lab


def _of_lab(archive: Archive, nodes: Iterable[str]) -> None:
    from agent.cluster.documents import parse  # noqa: PLC0415 - only the lab is read from files
    from lab.names import RUN  # noqa: PLC0415

    def objects() -> Iterator[str]:
        for file in sorted((RUN / "cluster").glob("*")):
            for document in parse(file, file.read_bytes()).documents:
                if (told := kept(document.body)) is not None:
                    yield json.dumps(told)

    archive.add_json("versions.json", lambda: {"podwall": version("podwall"), "kubernetes": None})
    archive.add("objects/all.jsonl", objects())
    for node in nodes:
        archive.add(f"nodes/{node}/log.txt", last_lines(RUN / node / "agent.log"))


def last_lines(file: Path, most: int = LOG_LINES) -> Iterator[str]:
    """The end of a file, read from there. Raises OSError."""
    with file.open("rb") as opened:
        start = max(0, file.stat().st_size - most * 1024)
        opened.seek(start)
        told = opened.read(most * 1024).decode(errors="replace").splitlines()
        yield from told[-most:]
