"""Who follows what happens to this node's connections: denials and flows, handed over piece by piece.

    follow {}                --> a session, and from now on everything is kept for it
    follow {"session": ...}  --> what came since, and how much of it was lost on the way
    30 s without a question  --> the session ends, and nothing is kept any more

A session holds at most 1,000 denials and 4,000 flows. What it had to drop is counted; what the rules denied
but did not log, for their limit, is counted as well, by their counters.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from agent.calls import Body, Room
from agent.cluster.model import IPAddress
from agent.compile.names import TABLE
from agent.conntrack import Flow
from agent.datapath import Datapath
from agent.denials import TOGETHER_S
from agent.flow_events import FlowEvents, Told
from agent.nft.handles import KernelRule, rules
from agent.sessions import Sessions
from cni import spec, wire
from cni.spec import CniError

EXPIRES_S = 30.0  # longer than the command waits for another node's agent that hangs
MOST_SESSIONS = 4
ROOM = wire.LIMIT - 4096
LATE_S = 0.25  # a denial is told at the end of its second, and a little later where all is busy
LOGGING_COMMENTS = ("denied", "would be denied")  # of policies in force, and in audit mode
ON_THE_WAY_S = 0.3  # from a rule that logs to the agent: the kernel gathers for 0.1 s

Named = Callable[[IPAddress], str]
FlowJson = Callable[[Flow, Named], dict[str, Any]]
DeniedJson = Callable[[Any], dict[str, Any]]


class Unlogged:
    """How many packets the rules denied and did not log: their counters' growth, less what was logged."""

    def __init__(self, begun: tuple[KernelRule, ...], logged: int) -> None:
        """Takes the rules as they are, and how many packets were logged so far."""
        self._counted = _denied_by(begun)
        self._denied = logged
        self._most = 0

    async def since(self, logged: Callable[[], int]) -> int:
        """At least how many since then; what is logged comes a moment after it was counted. Raises OSError.

        A rule that was made anew begins to count at 0.
        """
        now = _denied_by(await asyncio.to_thread(rules, TABLE))
        self._denied += sum(max(0, packets - self._counted.get(key, 0)) for key, packets in now.items())
        self._counted = now
        if self._denied > logged() + self._most:
            await asyncio.sleep(ON_THE_WAY_S)
        self._most = max(self._most, self._denied - logged())
        return self._most


def _denied_by(listed: tuple[KernelRule, ...]) -> dict[tuple[str, int], int]:
    return {
        (each.chain, each.handle): each.packets or 0 for each in listed if each.comment in LOGGING_COMMENTS
    }


class Session:
    """One follower."""

    def __init__(self, datapath: Datapath, flow_json: FlowJson, denied_json: DeniedJson, flows: bool) -> None:
        """Raises OSError."""
        self.id = secrets.token_hex(8)
        self._datapath = datapath
        self._flow_json, self._denied_json = flow_json, denied_json
        self._lost_before = datapath.denials.lost
        self._unlogged = Unlogged(rules(TABLE), self._logged())
        self._events = FlowEvents(self._tell) if flows else None
        self._denials = datapath.denials.subscribe()
        self._held: list[Told] = []

    def close(self) -> None:
        """Keep nothing for it any more."""
        self._denials.close()
        if self._events:
            self._events.close()

    async def news(self) -> dict[str, Any]:
        """What came since the last time, as much as fits into an answer; `more`: there is more.

        until: everything before this time has been told.
        """
        now = time.time()
        unlogged = await self._unlogged.since(self._logged)
        room = Room(ROOM)
        self._held += map(self._denied_json, self._denials.take())
        denials = []
        while self._held and room.takes(self._held[0]):
            denials.append(self._held.pop(0))
        flows = self._events.take(room.takes) if self._events else []
        lost = self._datapath.denials.lost - self._lost_before
        left = [each["time"] for each in self._held[:1]]
        left += [self._events.first["time"]] if self._events and self._events.first else []
        return {
            "session": self.id,
            "denials": denials,
            "flows": flows,
            "more": bool(left),
            "until": min([now - TOGETHER_S - LATE_S, *left]),
            "lost": {
                "denials": lost + self._denials.missed,
                "not_logged": unlogged,
                "flows": self._events.missed if self._events else 0,
                "flow_overruns": self._events.overruns if self._events else 0,
            },
        }

    def _logged(self) -> int:
        return self._datapath.denials.packets + self._datapath.denials.lost

    def _tell(self, event: str, flow: Flow, when: float) -> Told | None:
        named = self._named
        if not named(flow.source.address) and not named(flow.destination.address):
            return None
        return {"event": event, "time": when, **self._flow_json(flow, named)}

    def _named(self, address: IPAddress) -> str:
        return self._datapath.named(address) or self._datapath.addresses().get(address, "")


class Following:
    """All followers of this node."""

    def __init__(self, datapath: Datapath, flow_json: FlowJson, denied_json: DeniedJson) -> None:
        self._datapath, self._flow_json, self._denied_json = datapath, flow_json, denied_json
        self._sessions = Sessions[Session](MOST_SESSIONS, EXPIRES_S)

    async def follow(self, body: Body) -> object:
        """Answer the call. Raises CniError."""
        session = self._sessions.get(str(body.get("session", ""))) or self._begin(bool(body.get("flows")))
        try:
            return await session.news()
        except OSError as error:
            raise CniError(spec.TRY_AGAIN_LATER, f"the rules cannot be listed: {error}") from error

    async def unfollow(self, body: Body) -> object:
        """End a session at once."""
        self._sessions.end(str(body.get("session", "")))
        return None

    def _begin(self, flows: bool) -> Session:
        if self._sessions.full:
            raise CniError(
                spec.TRY_AGAIN_LATER, f"{MOST_SESSIONS} follow this node already; end one of them first"
            )
        try:
            session = Session(self._datapath, self._flow_json, self._denied_json, flows)
        except OSError as error:
            raise CniError(spec.TRY_AGAIN_LATER, f"flows cannot be followed: {error}") from error
        self._sessions.keep(session.id, session)
        return session
