"""Which addresses this node answers for: its Leases, and the speaker on its uplink.

    plan: shards --rank--> candidates --held--> addresses --> speaker
    able: no reason against answering --------^

A node that cannot answer (its rules are not in force, its uplink has no carrier) wants no Lease and gives up
those that it has. An address that has just moved from one Lease to another, when its Service's
externalTrafficPolicy was changed, is silent for a moment: agents learn of that one after another, and two of
them could hold the two Leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from agent import metrics
from agent.cluster.model import IPAddress
from agent.loadbalancer.candidate import Candidate, Clock, boottime
from agent.loadbalancer.claim import Timing
from agent.loadbalancer.leases import Leases
from agent.loadbalancer.shards import Shard
from agent.loadbalancer.speaker import Speaker, SpeakerError, has_carrier

HEIRS = 3
"""So many nodes of each Lease's order watch it closely; the others together read it about once a second."""
LATE_S = 5.0

MOVE_S = 1.0
REVIEW_S = 0.5
RESIGN_S = 2.0

log = logging.getLogger(__name__)


class Announcer:
    """One node's announcements; `not_able` says why it cannot answer for any address now, "" when it can."""

    def __init__(
        self, node: str, leases: Leases, not_able: Callable[[], str], clock: Clock = boottime
    ) -> None:
        self._node = node
        self._leases = leases
        self._not_able = not_able
        self._clock = clock
        self._timing = Timing()
        self._shards: Mapping[str, Shard] = {}
        self._lease_of: dict[IPAddress, str] = {}
        self._quiet_until: dict[IPAddress, float] = {}
        self._candidates: dict[str, Candidate] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._speaker: Speaker | None = None
        self._link: tuple[str, int] | None = None
        self._closed = False
        self.problem = "the uplink is not known yet"

    # What it is told

    def plan(self, shards: Mapping[str, Shard]) -> None:
        """These are all Leases and addresses from now on."""
        self._shards = shards
        now = self._clock()
        lease_of = {ip: name for name, shard in shards.items() for ip in shard.addresses}
        for ip, name in lease_of.items():
            if self._lease_of.get(ip, name) != name:
                self._quiet_until[ip] = now + MOVE_S
        self._quiet_until = {ip: end for ip, end in self._quiet_until.items() if ip in lease_of and end > now}
        if self._quiet_until:
            asyncio.get_running_loop().call_later(MOVE_S, self._speak)
        self._lease_of = lease_of
        self.review()

    def use_link(self, name: str, index: int) -> None:
        """Answer on this link, the node's uplink."""
        if self._closed or (self._link == (name, index) and self._speaker):
            return
        if self._speaker:
            self._speaker.close()
        self._link, self._speaker, self.problem = (name, index), None, ""
        try:
            self._speaker = Speaker(name, self._may_answer)
        except SpeakerError as error:
            self.problem = str(error)
            log.error("event=speaker-failed error=%r", str(error))
        self.review()

    # What it says

    def answered(self) -> Mapping[IPAddress, str]:
        """What this node answers for now, and by which Lease."""
        speaking = self._speaker.addresses if self._speaker else frozenset()
        return {ip: self._lease_of[ip] for ip in speaking if self._may_answer(ip)}

    def leases(self) -> Mapping[str, str]:
        """Who holds each Lease, as far as this node knows."""
        return {name: each.holder for name, each in self._candidates.items()}

    def reason(self) -> str:
        """Why this node answers for no address; "" when it may."""
        if self.problem:
            return self.problem
        if self._link and not has_carrier(self._link[0]):
            return f"uplink {self._link[0]} has no carrier"
        return self._not_able()

    # Life

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                self.review()
                await asyncio.sleep(REVIEW_S)
        finally:
            for task in self._tasks:
                task.cancel()

    async def close(self) -> None:
        """Be silent, and hand all Leases over to others."""
        self._closed = True
        if self._speaker:
            self._speaker.close()
            self._speaker = None
        await asyncio.gather(*(each.resign(RESIGN_S) for each in self._candidates.values()))
        for task in self._tasks:
            task.cancel()

    def review(self) -> None:
        """Want each Lease as this node's place in its order says."""
        if self._closed:
            return
        able = not self.reason()
        for name in self._shards.keys() - self._candidates.keys():
            self._start(name)
        for name, candidate in self._candidates.items():
            shard = self._shards.get(name)
            if shard is None:
                candidate.leave()
            else:
                rank = shard.rank(self._node) if able else None
                candidate.want(rank, observe_every(rank, len(shard.candidates)))
        self._speak()

    def _start(self, name: str) -> None:
        candidate = Candidate(
            name, self._node, self._leases, self._timing, changed=self._speak, clock=self._clock
        )
        self._candidates[name] = candidate
        task = asyncio.create_task(candidate.run(), name=f"lease {name}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        """A candidate has left. Until then there is no other for its Lease: two of one node would not see
        each other."""
        self._tasks.discard(task)
        del self._candidates[name]
        if name in self._shards:
            self.review()

    def _speak(self) -> None:
        if not self._speaker:
            return
        addresses = frozenset(ip for ip in self._lease_of if self._may_answer(ip))
        if addresses != self._speaker.addresses:
            log.info("event=announcing addresses=%s", ",".join(map(str, sorted(addresses, key=str))))
            self._speaker.speak_for(addresses)
        metrics.LOAD_BALANCER_ANNOUNCED.set(len(addresses))

    def _may_answer(self, ip: IPAddress) -> bool:
        name = self._lease_of.get(ip, "")
        candidate = self._candidates.get(name)
        if candidate is None or not candidate.held or self._clock() < self._quiet_until.get(ip, 0.0):
            return False
        return self._shards[name].can_answer(self._node, ip)


def observe_every(rank: int | None, candidates: int) -> float:
    """Seconds between an heir's looks at a Lease, 0 for as often as helps: the first ones; others seldom."""
    return 0.0 if rank is None or rank < HEIRS else max(LATE_S, candidates - HEIRS)
