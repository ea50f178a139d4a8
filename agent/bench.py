"""How fast the network between this node's Pods is: the agent's side of `podwall bench`.

    bench.open                 two Pods of nobody's, attached as the runtime's are: a client and a server;
                               the caller names the session, and may close it before this has answered
    bench.measure              one turn: from the client to the server, straight to it, or to any address
    bench.stay                 the server is still needed, by another node's client
    bench.close                they are gone, and their addresses free

        client  --podwallXXXXXXXX--  node: links, policy, routes  --podwallYYYYYYYY--  server
           +---------------------- raw0: a veth pair, nothing between ----------------------+

The two go through `Attachments`, as every Pod does: addresses of the node's range, rules in force before the
first packet, rows of the ledger that are gone with them. They belong to no Pod of the cluster, so no policy
selects them; policies of the Pods that they connect to hold. What each is measured by is a process of its
own (`agent.bench_worker`), which ends with the agent, and with it namespace and links.

Nobody needs to call `bench.close`: a few seconds after the last turn all of it ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Protocol

from agent.bench_worker import PORTS, RAW
from agent.calls import Answer, Body
from agent.sessions import chosen_id
from cni import spec
from cni.result import Result
from cni.spec import AttachmentKey, CniError, Request

LEASE_S = 10.0
"""How long a client may say nothing before all of it ends."""
MOST_SECONDS = 1.0
"""Of one turn."""
ANSWER_S = 8.0  # of one worker; the command waits ten for the agent

log = logging.getLogger(__name__)


class Attaching(Protocol):
    """What attaches Pods to the network."""

    async def add(self, request: Request, netns: int) -> Result:
        """Attach; raises CniError."""

    async def delete(self, key: AttachmentKey) -> None:
        """Detach; raises CniError."""


class Worker:
    """A process in a network namespace of its own that does what it is told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Worker:
        """Return when it is in its namespace. Raises CniError."""
        pipe = asyncio.subprocess.PIPE
        words = (sys.executable, "-m", "agent.bench_worker")
        made = cls(await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe))
        try:
            await made._answer()
        except BaseException:
            await made.end()
            raise
        return made

    @property
    def netns(self) -> str:
        """Its network namespace."""
        return f"/proc/{self._process.pid}/ns/net"

    async def do(self, what: str, **arguments: object) -> Mapping[str, Any]:
        """Its answer to a command. Raises CniError."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        return await self._answer()

    async def end(self) -> None:
        """Its namespace and links end with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout
        try:
            async with asyncio.timeout(ANSWER_S):
                line = await self._process.stdout.readline()
        except TimeoutError:
            self._process.kill()  # its answer must not be taken for the next one's
            raise CniError(spec.TRY_AGAIN_LATER, f"no measurement within {ANSWER_S:g} s") from None
        if not line:
            raise CniError(spec.FAILED, "the measuring process ended; the agent's log has more")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


@dataclass
class Session:
    """Two Pods of nobody's for one client, who must go on asking."""

    id: str
    client: Worker | None = None
    server: Worker | None = None
    attached: list[AttachmentKey] = field(default_factory=list)
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    watch: asyncio.Task[None] | None = None


class Bench:
    """What is measured on this node, for one client at a time."""

    def __init__(self, attaching: Attaching, lease_s: float = LEASE_S) -> None:
        self._attaching = attaching
        self._lease_s = lease_s
        self._session: Session | None = None
        self._turn = asyncio.Lock()

    def answers(self) -> Mapping[str, Answer]:
        """Each call's answer."""
        return {
            "bench.open": self.open,
            "bench.measure": self.measure,
            "bench.stay": self.stay,
            "bench.close": self.ask_to_close,
        }

    async def open(self, body: Body) -> object:
        """Attach both for a session of this id; say the server's addresses. Raises CniError."""
        name = chosen_id(body)
        if self._session:
            raise CniError(spec.TRY_AGAIN_LATER, "this node is being measured already; try again later")
        session = self._session = Session(name)
        try:
            async with self._turn:
                await self._make(session)
                session.watch = asyncio.create_task(self._end_when_forgotten(session))
        except BaseException:
            await self._end(session)
            raise
        return {
            "addresses": session.addresses["server"],
            "raw": str(RAW[1]),
            "ports": PORTS,
        }

    async def measure(self, body: Body) -> object:
        """One turn of what PORTS names, to an address and port. Raises CniError."""
        session = self._of(body)
        try:
            what, seconds = str(body["what"]), min(float(body["seconds"]), MOST_SECONDS)
            to = {"address": str(ip_address(body["address"])), "port": int(body.get("port", PORTS[what]))}
        except (KeyError, TypeError, ValueError) as error:
            raise CniError(spec.INVALID_CONFIG, f"nothing that can be measured: {error!r}") from error
        async with self._turn:
            session.asked.set()
            if not session.client:
                raise CniError(spec.TRY_AGAIN_LATER, "this measurement has ended")
            return await session.client.do(what, seconds=seconds, **to)

    async def stay(self, body: Body) -> object:
        """Another node's client is still measuring."""
        self._of(body).asked.set()
        return None

    async def ask_to_close(self, body: Body) -> object:
        """Return when both are gone."""
        session = self._of(body)
        await self._end(session)
        return None

    async def close(self) -> None:
        """End what there is."""
        if self._session:
            await self._end(self._session)

    def _of(self, body: Body) -> Session:
        if not self._session or self._session.id != body.get("id"):
            raise CniError(spec.TRY_AGAIN_LATER, "this measurement has ended")
        return self._session

    async def _make(self, session: Session) -> None:
        session.server, session.client = await Worker.start(), await Worker.start()
        for name, worker in (("server", session.server), ("client", session.client)):
            session.addresses[name] = await self._attach(
                session, f"podwall-bench-{session.id}-{name}", worker
            )
        for answer in (
            await session.server.do("serve"),
            await session.client.do("pair", netns=session.server.netns),
        ):
            if error := answer.get("error"):
                raise CniError(spec.FAILED, str(error))

    async def _attach(self, session: Session, container: str, worker: Worker) -> tuple[str, ...]:
        body = {
            "container_id": container,
            "ifname": "eth0",
            "netns": worker.netns,
            "config": {"cniVersion": "1.1.0", "name": "podwall-bench", "type": "podwall"},
        }
        session.attached.append(AttachmentKey(container, "eth0"))
        with open(worker.netns, "rb") as netns:  # noqa: ASYNC230, PTH123 - of /proc, which never blocks
            result = await self._attaching.add(spec.from_body("cni.ADD", body), netns.fileno())
        return tuple(str(each.address.ip) for each in result.ips)

    async def _end_when_forgotten(self, session: Session) -> None:
        while True:
            session.asked.clear()
            try:
                async with asyncio.timeout(self._lease_s):
                    await session.asked.wait()
            except TimeoutError:
                break
        log.info("event=bench-forgotten id=%s", session.id)
        session.watch = None
        await self._end(session)

    async def _end(self, session: Session) -> None:
        """Detach both; nobody else is measured before that is done."""
        async with self._turn:
            if session.watch:
                session.watch.cancel()
                session.watch = None
            for key in session.attached:
                with contextlib.suppress(CniError):  # it goes with its namespace: the agent reaps it
                    await self._attaching.delete(key)
            session.attached.clear()
            for worker in (session.client, session.server):
                if worker:
                    await worker.end()
            session.client = session.server = None
            if self._session is session:
                self._session = None
