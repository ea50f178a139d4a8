"""Following one packet through this node's kernel: what the agent does of `podwall trace`.

    trace.open  {"id", "matches": [...]}                    --> packets of these flows are marked and heard of
                {"id", "from": {...}, "destination", "port"}  --> and a socket, which will send such a one
    trace.send  {"id"}                                      --> it connects, and what became of that
    trace.read  {"id"}                                      --> the rules that the packets met, in order
    trace.close {"id"}                                      --> nothing is left
    20 s without a question                                 --> as if closed

The kernel removes what marks the packets with the agent's socket, so nothing is left of an agent that was
killed either (`agent.nft.trace`). Nothing but the agent's own capabilities is needed.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from agent.calls import Answer, Body
from agent.cluster.model import IPAddress
from agent.datapath import Datapath
from agent.denials import link_name
from agent.headers import PROTOCOL_NAMES, Headers
from agent.nft.handles import KernelRule, rules
from agent.nft.model import TableName
from agent.nft.trace import Match, Step, Trace, TraceError
from agent.probe import SILENT, Attempt, FindInside, Inside, Outcome, Target, open_inside
from agent.sessions import Sessions, chosen_id
from cni import spec
from cni.spec import CniError

EXPIRES_S = 20.0  # longer than the command waits for another node's agent that hangs
MOST_SESSIONS = 4
MOST_STEPS, MOST_MATCHES = 2000, 256
WAIT_S, MOST_WAIT_S = 1.5, 6.0
_NUMBERS = {name.upper(): number for number, name in PROTOCOL_NAMES.items()}


@dataclass(slots=True)
class Session:
    """What one question holds: the marking table, and the socket that will send."""

    trace: Trace
    attempt: Attempt | None = None
    rules: dict[tuple[str, str], Mapping[int, KernelRule]] = field(default_factory=dict)

    def close(self) -> None:
        """Give everything back."""
        self.trace.close()
        if self.attempt:
            self.attempt.close()


def answers(datapath: Datapath, find_inside: FindInside) -> Mapping[str, Answer]:
    """The four calls."""
    traces = Traces(datapath, find_inside)
    return {
        "trace.open": traces.open,
        "trace.send": traces.send,
        "trace.read": traces.read,
        "trace.close": traces.close,
    }


class Traces:
    """All packets that are followed through this node."""

    def __init__(self, datapath: Datapath, find_inside: FindInside) -> None:
        self._datapath = datapath
        self._find_inside = find_inside
        self._sessions = Sessions[Session](MOST_SESSIONS, EXPIRES_S)
        self._opening: dict[str, asyncio.Event] = {}  # set when it is done

    async def open(self, body: Body) -> object:
        """Mark packets, and bind the socket that will send one where that is asked for. Raises CniError."""
        name = chosen_id(body)
        if name in self._opening or self._sessions.get(name):
            raise CniError(spec.FAILED, "this trace was opened before")
        if self._sessions.full:
            raise CniError(
                spec.TRY_AGAIN_LATER, f"{MOST_SESSIONS} packets are traced here already; ask again"
            )
        done = self._opening[name] = asyncio.Event()
        try:
            return await self._open(name, body)
        finally:
            del self._opening[name]
            done.set()

    async def _open(self, name: str, body: Body) -> object:
        matches, target, inside = _question(body, self._find_inside)
        attempt = Attempt(target) if target else None
        said: dict[str, Any] = {}
        try:
            if attempt is not None and target is not None:
                source, sport = await asyncio.to_thread(_in_thread, inside, attempt)
                matches.append(Match(_NUMBERS[target.protocol], None, sport, target.address, target.port))
                said = {"source": source, "sport": sport}
            self._sessions.keep(name, Session(Trace(name, matches), attempt))
        except (OSError, TraceError) as error:
            if attempt:
                attempt.close()
            raise CniError(spec.FAILED, str(error)) from error
        return said

    async def send(self, body: Body) -> object:
        """Connect, and say what became of that. Raises CniError."""
        session = self._asked(body)
        if session.attempt is None:
            raise CniError(spec.FAILED, "this trace was opened to wait, not to send")
        wait_s = min(float(body.get("wait_s", WAIT_S)), MOST_WAIT_S)
        outcome = await asyncio.to_thread(_send, session.attempt, wait_s)
        return {"verdict": outcome.verdict, "words": outcome.words}

    async def read(self, body: Body) -> object:
        """The rules that packets met since the last time. Raises CniError."""
        session = self._asked(body)
        steps = session.trace.read()[:MOST_STEPS]
        await asyncio.to_thread(_look_up, session, steps)
        return {
            "steps": [step_json(each, session.rules, self._datapath) for each in steps],
            "lost": session.trace.lost,
        }

    async def close(self, body: Body) -> object:
        """Follow no more; what is being opened is waited for."""
        name = str(body.get("id", ""))
        if opening := self._opening.get(name):
            await opening.wait()
        self._sessions.end(name)
        return None

    def _asked(self, body: Body) -> Session:
        session = self._sessions.get(str(body.get("id", "")))
        if session is None:
            raise CniError(spec.FAILED, "this trace has ended: nobody asked for it for a while")
        return session


# The question


def _question(body: Body, find_inside: FindInside) -> tuple[list[Match], Target | None, Inside | None]:
    """Which packets, what to connect to, and from inside of what. Raises CniError."""
    try:
        matches = [_match(each) for each in list(body.get("matches", ()))[:MOST_MATCHES]]
        origin = body.get("from")
        if origin is None:
            return matches, None, None
        target = Target(ip_address(body["destination"]), int(body["port"]), str(body["protocol"]))
        if target.protocol not in ("TCP", "UDP", "SCTP"):
            raise ValueError(f"{target.protocol} has no ports")
        namespace, name = origin.get("namespace", ""), origin.get("name", "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CniError(spec.DECODING_FAILURE, f"this names no packet to follow: {error!r}") from error
    if not name:
        return matches, target, None
    inside = find_inside(namespace, name)
    if isinstance(inside, str):
        raise CniError(spec.FAILED, inside)
    return matches, target, inside


def _match(said: Mapping[str, Any]) -> Match:
    def address(key: str) -> IPAddress | None:
        return ip_address(said[key]) if said.get(key) else None

    return Match(
        _NUMBERS[said["protocol"]],
        address("source"),
        said.get("sport"),
        address("destination"),
        said.get("dport"),
    )


# The connection


def _in_thread(inside: Inside | None, attempt: Attempt) -> tuple[str, int]:
    """Bind the socket that will send, in a thread that ends inside of the Pod. Raises OSError."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(_bind, inside, attempt).result()


def _bind(inside: Inside | None, attempt: Attempt) -> tuple[str, int]:
    """The address and port that its packets will come from. Raises OSError."""
    open_inside(inside, [attempt])
    if attempt.opened is None:
        raise OSError(attempt.outcome.words if attempt.outcome else "no socket can be made")
    target = attempt.target
    family = socket.AF_INET if target.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as routed:  # says which address, and sends nothing
        try:
            routed.connect((str(target.address), target.port))
        except OSError as error:
            said = f"there is no way from here to {target.address}: {os.strerror(error.errno or 0)}"
            raise OSError(error.errno, said) from error
        source = routed.getsockname()[0]
    attempt.opened.bind((source, 0))
    return source, attempt.opened.getsockname()[1]


def _send(attempt: Attempt, wait_s: float) -> Outcome:
    """Connect, and wait so long for what becomes of it."""
    deadline = time.monotonic() + wait_s
    attempt.begin()
    with selectors.DefaultSelector() as selector:
        if attempt.opened is not None and attempt.outcome is None:
            selector.register(attempt.opened, attempt.event)
        while attempt.outcome is None and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                attempt.go_on()
    return attempt.outcome or Outcome(SILENT)


# The answer


def _look_up(session: Session, steps: Iterable[Step]) -> None:
    """List the rules of the tables that the packets met. A table that cannot be listed has none."""
    for family, table in {(each.family, each.table) for each in steps} - session.rules.keys():
        try:
            found = rules(TableName(family, table))  # type: ignore[arg-type]  # the kernel's families
        except OSError:
            found = ()
        session.rules[family, table] = {each.handle: each for each in found}


def step_json(
    of: Step, known: Mapping[tuple[str, str], Mapping[int, KernelRule]], datapath: Datapath
) -> dict[str, Any]:
    """One rule that a packet met; `policies` are those of a class's chain."""
    rule = known.get((of.family, of.table), {}).get(of.handle)
    pod_class = of.chain.partition("_")[2] if of.chain.startswith(("ingress", "egress")) else ""
    return {
        "id": f"{of.id:08x}",
        "family": of.family,
        "table": of.table,
        "chain": of.chain,
        "handle": of.handle,
        "kind": of.kind,
        "verdict": of.verdict,
        "target": of.target,
        "comment": rule.comment if rule else "",
        "policies": ["/".join(key) for key in datapath.policies.policies_of(pod_class)] if pod_class else [],
        "in": link_name(of.in_link),
        "out": link_name(of.out_link),
        "packet": _packet_json(of.packet) if of.packet else None,
    }


def _packet_json(of: Headers) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL_NAMES.get(of.protocol, str(of.protocol)),
        "source": str(of.source),
        "sport": of.sport,
        "destination": str(of.destination),
        "dport": of.dport,
    }
