"""What the tests of Pods are made of: namespaces, a datapath that obeys, requests as the binary sends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.pods.attachments import Attachments
from agent.pods.ledger import Ledger
from agent.pods.model import Attachment, identities
from agent.pods.wiring import Wiring
from cni import spec
from tests.agent.waiting import eventually
from tests.linux import command

CIDRS = (ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:10:244:1::/64"))


@dataclass
class Namespace:
    """A named network namespace."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def exec(self, *words: str) -> str:
        return command("ip", "netns", "exec", self.name, *words)


@dataclass
class Namespaces:
    """Makes namespaces and takes all of them away at the end."""

    made: list[Namespace] = field(default_factory=list)

    def new(self, what: str = "pod") -> Namespace:
        namespace = Namespace(f"podwallt-{what}-{uuid.uuid4().hex[:8]}")
        command("ip", "netns", "add", namespace.name)
        self.made.append(namespace)
        return namespace

    def delete(self, namespace: Namespace) -> None:
        self.made.remove(namespace)
        command("ip", "netns", "del", namespace.name)


@dataclass(frozen=True)
class Settings:
    """What the agent's configuration says."""

    node_name: str = "node-a"
    mtu: int = 1450
    address_rest_s: float = 0.05
    add_timeout_s: float = 5.0


@dataclass
class Rules:
    """A datapath that keeps what it is told, and fails or waits when a test says so."""

    pods: set[Attachment] = field(default_factory=set)
    fail_attached: str = ""
    fail_detached: str = ""
    hold: asyncio.Event | None = None
    reason: str = ""

    async def attached(self, attachment: Attachment) -> None:
        self.pods.add(attachment)
        if self.hold:
            await self.hold.wait()
        if self.fail_attached:
            raise RuntimeError(self.fail_attached)

    async def detached(self, attachment: Attachment) -> None:
        if self.fail_detached:
            raise RuntimeError(self.fail_detached)
        self.pods.discard(attachment)

    def not_ready(self) -> str:
        return self.reason


@dataclass
class Agent:
    """The parts of an agent that attach Pods."""

    ledger: Ledger
    wiring: Wiring
    rules: Rules
    attachments: Attachments

    def rows(self) -> dict[str, tuple[str, ...]]:
        """Links and their addresses as the file has them, Pods that ADD answered for."""
        return {
            row.attachment.link: tuple(map(str, row.attachment.addresses))
            for row in self.ledger.rows()
            if row.attached
        }

    async def add(self, container_id: str, pod: Namespace, **config: Any) -> Attachment:
        """Attach a namespace."""
        with pod.descriptor() as fd:
            await self.attachments.add(request("ADD", container_id, pod.path, **config), fd)
        return self.attachments.current[key(container_id)]

    async def delete(self, container_id: str) -> None:
        """Detach, and wait until nothing is left."""
        await self.attachments.delete(key(container_id))
        await eventually(lambda: not self.attachments.leaving)


@contextlib.asynccontextmanager
async def agent(directory: Path, settings: Settings = Settings(), **ready: Any) -> AsyncIterator[Agent]:
    """An agent that has recovered and knows its Node."""
    ledger = Ledger(directory / "ledger.sqlite3", "boot-1")
    wiring = Wiring()
    rules = Rules()
    attachments = Attachments(settings, ledger, wiring, rules)
    try:
        await attachments.recover()
        attachments.set_pod_cidrs(ready.get("cidrs", CIDRS))
        yield Agent(ledger, wiring, rules, attachments)
    finally:
        await attachments.close()
        await wiring.close()


def request(command: str, container_id: str, netns: str = "", **config: Any) -> spec.Request:
    """A request as the binary sends it."""
    given = {"cniVersion": "1.1.0", "name": "podwall", "type": "podwall", **config}
    body = {
        "container_id": container_id,
        "ifname": "eth0",
        "netns": netns,
        "args": {
            "K8S_POD_NAMESPACE": "default",
            "K8S_POD_NAME": f"pod-{container_id[:20]}",
            "K8S_POD_UID": f"uid-{container_id[:20]}",
        },
        "config": given,
    }
    return spec.from_body(f"cni.{command}", body)


def attachment(number: int = 5, **fields: Any) -> Attachment:
    """The interface of Pod default/web-`number`, with whatever else it is given."""
    identity = next(identities(key(f"container-{number}")))
    made = Attachment(
        container_id=f"container-{number}",
        ifname="eth0",
        link=identity.link,
        namespace="default",
        pod=f"web-{number}",
        pod_uid=f"uid-{number}",
        addresses=(ipaddress.ip_address(f"10.244.1.{number}"), ipaddress.ip_address(f"fd00::{number}")),
        mac=identity.mac,
        host_mac=identity.host_mac,
        mtu=1450,
        netns="/run/netns/web",
        network="podwall",
    )
    return replace(made, **fields)


def key(container_id: str) -> spec.AttachmentKey:
    """The attachment that `request` asks for."""
    return spec.AttachmentKey(container_id, "eth0")


def kernel_links() -> set[str]:
    """The devices in the test's namespace, without the loopback."""
    return {line.split(": ")[1].split("@")[0] for line in command("ip", "-o", "link").splitlines()} - {"lo"}


def kernel_rows() -> dict[str, tuple[str, ...]]:
    """Pod links and the addresses routed to them, as the kernel has them."""
    routes = [line.split() for family in "46" for line in command("ip", f"-{family}", "route").splitlines()]
    found = {link: tuple(r[0] for r in routes if r[2] == link) for link in kernel_links()}
    return {link: addresses for link, addresses in found.items() if re.fullmatch(r"podwall[0-9a-f]{8}", link)}


def fill(directory: Path) -> Path:
    """Leave no room on a file system; the file that takes it is returned."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler
