"""Who holds a Lease: one node's side of it, as a state machine without clock or network.

    holder   writes the Lease every renew_s.  It holds until duration_s - margin_s after it *began* to send
             the last write that succeeded, and no longer, whatever became of later ones.
    heir     reads the Lease every observe_s.  When it has not seen it change for duration_s, by its own
             clock and since the answer that showed it first, it takes it: by a write that fails when the
             Lease is not the one that was read.

        holder   |-send W1......................|stops             a Lease at W1 can only be taken by a write
        server            W1                             W2        on W1, which fails once W1 was renewed;
        heir                |first seen.........|duration_s|-send  W1 was seen after it was sent, so by then
                                                                   the holder has stopped

No two hold it at once, whatever messages are lost, late or repeated, as long as clocks run equally fast: a
margin_s of 0.5 in a duration_s of 3 bears clocks that differ by a sixth. The times inside a Lease are for
people; nobody compares them with a clock.

A free Lease (nobody's, or not made yet) is taken by the heir of rank 0 at once, by the next ones after a
moment each, so that many Leases spread over the nodes. Who writes his own name into a Lease that has it
already need not wait: there is one agent per node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from agent.cluster.model import Lease

NEVER = float("-inf")

Verb: TypeAlias = Literal["read", "create", "take", "renew", "release"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; `stagger_s` is what one rank waits longer than the one before for a free Lease."""

    duration_s: int = 3
    renew_s: float = 1.0
    observe_s: float = 0.75
    margin_s: float = 0.5
    stagger_s: float = 1.5
    retry_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Step:
    """What to do with the Lease: read it, or write it over the one that was read (`basis`)."""

    verb: Verb
    basis: Lease | None = None


class Claim:
    """What one node knows of a Lease, and whether it holds it.

    `next` says what to do now, or when to ask again; then `began` is called, and one of `read`, `wrote`,
    `lost_race` and `failed` with the outcome. All times are seconds of one monotonic clock.
    """

    def __init__(self, node: str, timing: Timing) -> None:
        self._node = node
        self._timing = timing
        self._rank: int | None = None
        self._observe_s = timing.observe_s
        self._lease: Lease | None = None  # as the last answer had it; None: there was none
        self._known = False  # whether a write may be based on that answer
        self._unchanged_since = self._read_at = NEVER
        self._sent_at = self._renewed_at = NEVER
        self._held_until = self._not_before = self._bereft_until = NEVER

    # What it is for

    def held(self, now: float) -> bool:
        """Whether this node may act as the holder at this moment."""
        return now < self._held_until

    @property
    def held_until(self) -> float:
        """When it stops to be the holder unless it succeeds to renew; long ago when it is not."""
        return self._held_until

    @property
    def holder(self) -> str:
        """Who holds it, as far as is known here; empty for nobody."""
        return self._lease.holder if self._lease else ""

    def want(self, rank: int | None, observe_s: float = 0.0) -> None:
        """Be an heir of this rank, 0 the first; None: neither hold it nor care who does.

        `observe_s` is how often to look at it, for one who is far from the first.
        """
        if rank is None:
            self._held_until = NEVER  # at once; that others are told comes after
        self._rank, self._observe_s = rank, observe_s or self._timing.observe_s

    # What to do

    def next(self, now: float) -> Step | float:
        """The step to take, or the time at which to ask again; `inf`: when something else is wanted."""
        if now < self._not_before:
            return self._not_before
        if self._rank is None and not self._is_mine:
            return float("inf")
        if not self._known:
            return Step("read")
        if self._rank is None:
            return Step("release", self._lease)
        if self._is_mine:
            due = self._renewed_at + self._timing.renew_s if self.held(now) else now
            return Step("renew", self._lease) if now >= due else due
        return self._next_of_heir(now, self._rank)

    @property
    def _is_mine(self) -> bool:
        return self._lease is not None and self._lease.holder == self._node

    def _next_of_heir(self, now: float, rank: int) -> Step | float:
        take_at = self._take_at(rank)
        if now >= take_at:
            return Step("take", self._lease) if self._lease else Step("create")
        read_at = self._read_at + self._observe_s
        return Step("read") if now >= read_at else min(read_at, take_at)

    def _take_at(self, rank: int) -> float:
        if self._lease is None or not self._lease.holder:
            return max(self._bereft_until, self._unchanged_since + rank * self._timing.stagger_s)
        duration = max(self._timing.duration_s, self._lease.duration_s)
        # Who is second is a little later: two that try at once cost a write that fails.
        return self._unchanged_since + duration + rank * 0.1

    # What came of it

    def began(self, now: float) -> None:
        """A step is about to be sent."""
        self._sent_at = now

    def read(self, now: float, lease: Lease | None) -> None:
        """The Lease as it is; None when there is none."""
        # Who could not look for so long does not know whether the holder could renew, which comes first then.
        blind = now - self._read_at > self._timing.duration_s + self._observe_s
        if blind or not _same(lease, self._lease):
            self._unchanged_since = now
        if lease is None and self._lease is not None and self._lease.holder not in {"", self._node}:
            # Somebody removed it under its holder's hands, who may not know it yet.
            self._bereft_until = now + max(self._timing.duration_s, self._lease.duration_s)
        self._known, self._lease, self._read_at = True, lease, now

    def wrote(self, now: float, lease: Lease) -> None:
        """The step's write succeeded: this is the Lease now."""
        self.read(now, lease)
        if self._is_mine and self._rank is not None:
            self._renewed_at = self._sent_at
            self._held_until = self._sent_at + self._timing.duration_s - self._timing.margin_s

    def lost_race(self) -> None:
        """The write was refused, for the Lease is another by now: who writes it is to be seen."""
        self._known = False

    def failed(self, now: float) -> None:
        """Nobody knows whether the step was done: it is to be seen, after a moment."""
        self._known = False
        self._not_before = now + self._timing.retry_s


def _same(one: Lease | None, other: Lease | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.resource_version == other.resource_version
