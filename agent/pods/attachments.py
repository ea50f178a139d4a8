"""What the container runtime asks of this node: attach a Pod, detach it, check it, clear away, say how it is.

    ADD   addresses and names --> ledger: reserved --+--> the link    --+--> ledger: attached --> answer
                                                     +--> its rules   --+
    DEL   rules out, link out of the datapath --> answer; the rest in the background

Requests of one container wait for each other, others do not. Whatever fails in an ADD is undone before
its answer, and an ADD that has begun is brought to an end also when nobody waits for it any more. Memory
holds what the ledger holds; after a start `recover` makes ledger, kernel and memory agree.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from agent.pods import host_ports
from agent.pods.answers import kubernetes_name, refusal, result, unlike_previous
from agent.pods.departures import Departure, Departures
from agent.pods.ipam import Addresses, BadCidrsError, ExhaustedError, IPNetwork
from agent.pods.ledger import Cause, Ledger, LedgerError, LedgerThread, Row
from agent.pods.model import Attachment, identities, shaper_name
from agent.pods.wiring import IPV6_MTU_MIN, FoundLink, Wiring, WiringError
from cni import spec
from cni.result import Result
from cni.spec import AttachmentKey, CniError, Request

UNDO_LIMIT_S = 5.0
"""How long a failed ADD waits for its link to be gone before it answers all the same."""

CLOSE_LIMIT_S = 1.0
"""How much longer requests may take when the agent ends and nobody waits for them any more."""

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class Settings(Protocol):
    """What of the agent's configuration is used here."""

    @property
    def node_name(self) -> str: ...
    @property
    def mtu(self) -> int: ...
    @property
    def address_rest_s(self) -> float: ...
    @property
    def add_timeout_s(self) -> float: ...


class Datapath(Protocol):
    """The rules of a Pod in the kernel."""

    async def attached(self, attachment: Attachment) -> None:
        """Return when the Pod's rules are in force; raise when they cannot be."""

    async def detached(self, attachment: Attachment) -> None:
        """Return when no rule speaks of the Pod any more, also when none did; raise otherwise."""

    def not_ready(self) -> str:
        """Why no Pod can be attached now; "" when one can."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What `recover` found: Pods that go on, and attachments that it ended."""

    adopted: tuple[Attachment, ...]
    ended: tuple[Attachment, ...]


def seconds_since_boot() -> float:
    """The clock of the ledger: it goes on while the agent is dead and while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Attachments:
    """All attachments of the node. `recover` comes first, then calls in any order and number."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        wiring: Wiring,
        datapath: Datapath,
        clock: Callable[[], float] = seconds_since_boot,
    ) -> None:
        self._settings = settings
        self._wiring = wiring
        self._datapath = datapath
        self._clock = clock
        self._mtu = settings.mtu
        self._no_cidrs = f"Node {settings.node_name} is not known yet, so there are no Pod addresses"
        self._recovered = False
        self.addresses = Addresses(settings.address_rest_s)
        self._current: dict[AttachmentKey, Attachment] = {}
        self._adding: dict[AttachmentKey, Attachment] = {}
        self._links: set[str] = set()
        self._shapers: set[str] = set()
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._ledger = LedgerThread(ledger, self._known)
        self._departures = Departures(
            wiring,
            self._ledger,
            rules_out=self._rules_out,
            released=self._released,
            clock=clock,
            rest_s=settings.address_rest_s,
        )

    @property
    def current(self) -> Mapping[AttachmentKey, Attachment]:
        """The Pods on the network; changes as they come and go."""
        return self._current

    @property
    def leaving(self) -> tuple[Attachment, ...]:
        """Those that are detached but not cleared away yet; their addresses are not free."""
        return tuple(self._departures)

    def set_pod_cidrs(self, cidrs: Sequence[IPNetwork], problem: str = "") -> None:
        """Give addresses from the Node's podCIDRs from now on; without usable ones ADD is refused.

        `problem` says why there are none, where that is known.
        """
        node = f"Node {self._settings.node_name}"
        if not cidrs:
            problem = problem or (
                f"{node} has no spec.podCIDRs: the controller manager assigns them (--allocate-node-cidrs)"
            )
        elif tuple(cidrs) != self.addresses.cidrs:
            try:
                self.addresses.set_cidrs(cidrs)
            except BadCidrsError as error:
                problem = f"{node}, spec.podCIDRs: {error}"
        if problem and problem != self._no_cidrs:
            log.error("event=no-pod-cidrs error=%r", problem)
        self._no_cidrs = problem

    def set_mtu(self, mtu: int) -> None:
        """The MTU in bytes that new Pods get, unless the configuration sets one."""
        self._mtu = self._settings.mtu or mtu

    def not_ready(self) -> str:
        """Why ADD is refused now; "" when it is not."""
        if not self._recovered:
            return "the agent is still looking at the Pods that are there"
        if reason := self._datapath.not_ready() or self._no_cidrs:
            return reason
        if not self._mtu:
            return f"Node {self._settings.node_name}: the uplink's MTU is not known yet (or set mtu)"
        if self._mtu < IPV6_MTU_MIN and any(each.version == 6 for each in self.addresses.cidrs):
            return f"mtu {self._mtu} is less than IPv6 needs ({IPV6_MTU_MIN}): set mtu, or the uplink's"
        return ""

    async def close(self) -> None:
        """Bring what runs to its end and close the ledger. Pods stay on the network.

        What does not end in time is left half-made for the next agent, as after a crash.
        """
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=CLOSE_LIMIT_S)
            for task in late:
                task.cancel()
            if late:
                log.warning("event=requests-left count=%d", len(late))
                await asyncio.wait(late)
        await self._departures.close()
        await self._ledger.close()

    # The runtime's commands

    async def add(self, request: Request, netns: int) -> Result:
        """Attach a Pod, whose namespace the descriptor is. Raises CniError, nothing left of it."""
        own = os.dup(netns)  # the caller's may be closed, and its number be another's, before this ends

        async def whole() -> Result:
            try:
                return await self._add(request, own)
            finally:
                os.close(own)

        return await self._to_its_end(whole())

    async def delete(self, key: AttachmentKey) -> None:
        """Detach; what is not there is no error. Raises CniError when it is not cut off yet."""
        await self._to_its_end(self._delete(key))

    async def check(self, request: Request, netns: int) -> None:
        """Compare what is there with what was made. Raises CniError naming the differences."""
        key = AttachmentKey(request.container_id, request.ifname)
        attachment = self._current.get(key)
        if attachment is None:
            raise CniError(
                spec.UNKNOWN_CONTAINER, f"container {key.container_id} has no interface {key.ifname} here"
            )
        async with self._serial(key.container_id):
            try:
                found = await self._wiring.check(attachment, netns)
            except WiringError as error:
                raise refusal(attachment, error) from error
        found += unlike_previous(attachment, request.config)
        if found:
            raise CniError(spec.FAILED, f"Pod {attachment}: {'; '.join(found)}")

    async def collect(self, request: Request) -> None:
        """Detach what is not in the runtime's list of valid attachments. Raises CniError naming failures."""
        valid = spec.valid_attachments(request.config)
        network = request.config.get("name")
        ended = [
            key
            for key, each in self._current.items()
            if key not in valid and each.network in ("", network) and not _is_anonymous(each)
        ]
        outcomes = await asyncio.gather(*map(self.delete, ended), return_exceptions=True)
        errors = [str(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
        log.info("event=collected ended=%d failed=%d", len(ended) - len(errors), len(errors))
        if errors:
            raise CniError(spec.TRY_AGAIN_LATER, "; ".join(errors))

    def status(self) -> None:
        """Return when ADD would be served. Raises CniError 50 saying why it would not."""
        if reason := self.not_ready():
            raise CniError(spec.NOT_AVAILABLE, reason)

    async def reap(self) -> int:
        """Detach Pods whose link vanished with their namespace; return how many."""
        known = dict(self._current)
        there = {link.link for link in await self._wiring.find()}
        vanished = [key for key, each in known.items() if each.link not in there]
        await asyncio.gather(*map(self.delete, vanished))
        return len(vanished)

    # ADD

    async def _add(self, request: Request, netns: int) -> Result:
        begun = time.perf_counter()
        key = AttachmentKey(request.container_id, request.ifname)
        async with self._serial(key.container_id):
            if reason := self.not_ready():
                raise CniError(spec.TRY_AGAIN_LATER, reason)
            await self._end_former(key)
            attachment = self._choose(key, request)
            try:
                await self._make(attachment, netns)
            except Exception as error:
                await self._undo(attachment)
                log.warning(
                    "event=add-failed pod=%s link=%s error=%r", attachment, attachment.link, str(error)
                )
                raise refusal(attachment, error) from error
            self._current[key] = self._adding.pop(key)
        log.info(
            "event=added pod=%s container=%s link=%s addresses=%s ms=%.1f",
            attachment,
            key.container_id,
            attachment.link,
            ",".join(map(str, attachment.addresses)),
            (time.perf_counter() - begun) * 1e3,
        )
        return result(attachment)

    async def _end_former(self, key: AttachmentKey) -> None:
        """Wait until an earlier attachment by this name is gone; one that is in use is an error."""
        former = self._current.get(key)
        if former and await self._exists(former):
            raise CniError(
                spec.FAILED,
                f"container {key.container_id} has interface {key.ifname} already (link {former.link})",
                "call DEL first",
            )
        if former:  # its namespace is gone, and the runtime never said so
            await self._depart(former)
        if departure := self._departures.of(key):
            await _within(self._settings.add_timeout_s, departure.done.wait())
        if self._departures.of(key):
            raise CniError(
                spec.TRY_AGAIN_LATER,
                f"container {key.container_id}'s former interface {key.ifname} is not cleared away yet: "
                f"{self._departures.trouble or 'still trying'}",
            )

    async def _exists(self, attachment: Attachment) -> bool:
        return await self._wiring.exists(attachment.link)

    def _choose(self, key: AttachmentKey, request: Request) -> Attachment:
        """Choose names and addresses, which are taken then, and all else that is known beforehand."""
        namespace, pod, uid = (
            kubernetes_name(request, f"K8S_POD_{each}") for each in ("NAMESPACE", "NAME", "UID")
        )
        limits = spec.bandwidth(request.config)
        mappings = spec.port_mappings(request.config)
        if taken := host_ports.conflict(mappings, self._holding()):
            raise CniError(spec.FAILED, f"Pod {namespace}/{pod}: {taken}")
        try:
            addresses = self.addresses.take(self._clock())
        except ExhaustedError as error:
            raise CniError(spec.TRY_AGAIN_LATER, f"Node {self._settings.node_name}: {error}") from error
        identity = next(
            each
            for each in identities(key)
            if each.link not in self._links and shaper_name(each.link) not in self._shapers
        )
        attachment = Attachment(
            container_id=key.container_id,
            ifname=key.ifname,
            link=identity.link,
            namespace=namespace,
            pod=pod,
            pod_uid=uid,
            addresses=addresses,
            mac=identity.mac,
            host_mac=identity.host_mac,
            mtu=self._mtu,
            netns=request.netns,
            network=str(request.config.get("name", "")),
            bandwidth=limits,
            port_mappings=mappings,
        )
        self._take_names(attachment)
        self._adding[key] = attachment
        return attachment

    async def _make(self, attachment: Attachment, netns: int) -> None:
        """Ledger, then link and rules side by side: one without the other lets no packet through."""
        await self._ledger.run(lambda ledger: ledger.reserve(attachment))
        outcomes = await asyncio.gather(
            self._wiring.attach(attachment, netns), self._rules_in(attachment), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        await self._ledger.run(lambda ledger: ledger.attach(attachment.key))

    async def _undo(self, attachment: Attachment) -> None:
        del self._adding[attachment.key]
        departure = self._departures.begin(attachment)
        try:
            await self._departures.isolate(departure)
        except Exception as error:
            log.warning("event=undo-retry pod=%s error=%r", attachment, str(error))
        await _within(UNDO_LIMIT_S, departure.gone.wait())

    # DEL

    async def _delete(self, key: AttachmentKey) -> None:
        begun = time.perf_counter()
        async with self._serial(key.container_id):
            attachment = self._current.get(key) or self._anonymous(key)
            departure = self._departures.of(key)
            if attachment is None and departure is None:
                return
            try:
                if attachment:
                    await self._depart(attachment)
                elif departure:
                    await self._departures.isolate(departure)
            except Exception as error:
                pod = attachment or (departure and departure.attachment)
                raise CniError(spec.TRY_AGAIN_LATER, f"Pod {pod} is not cut off yet: {error}") from error
        log.info("event=deleted container=%s ms=%.1f", key.container_id, (time.perf_counter() - begun) * 1e3)

    async def _depart(self, attachment: Attachment) -> Departure:
        del self._current[attachment.key]
        departure = self._departures.begin(attachment)
        await self._departures.isolate(departure)
        return departure

    def _anonymous(self, key: AttachmentKey) -> Attachment | None:
        """An adopted attachment whose container was not known: its link's name tells that it is this one."""
        for identity in islice(identities(key), 3):
            found = self._current.get(AttachmentKey(identity.link, ""))
            if found:
                return found
        return None

    def _released(self, attachment: Attachment, freed: float) -> None:
        self.addresses.free(attachment.addresses, freed)
        self._links.discard(attachment.link)
        self._shapers.discard(attachment.shaper)
        log.debug("event=released pod=%s link=%s", attachment, attachment.link)

    # The start

    async def recover(self) -> Recovered:
        """Make ledger, kernel and memory agree: Pods that are there go on, the rest is cleared away.

        Raises LedgerError or WiringError when they cannot be read; nothing was changed then.
        """
        links = {found.link: found for found in await self._wiring.find()}
        rows = await self._ledger.run(Ledger.rows)
        for address, freed in await self._ledger.run(Ledger.resting):
            self.addresses.rest(address, freed)
        if rows:
            self.addresses.begin_behind(rows[-1].attachment.addresses)
        kept: list[Attachment] = []
        ended: list[Attachment] = []
        for row in rows:
            alive = row.attached and _alive(links.get(row.attachment.link))
            (kept if alive else ended).append(row.attachment)
        written = {row.attachment.link for row in rows}
        unwritten = await self._adopt([each for each in links.values() if each.link not in written], kept)
        for attachment in kept + ended:
            self._take_names(attachment)
            for address in attachment.addresses:
                self.addresses.hold(address)
        self._current.update({attachment.key: attachment for attachment in kept})
        await self._restore([each for each in kept if _needs_repair(each, links[each.link])])
        await self._end([each.link for each in unwritten], ended)
        self._recovered = True
        log.info("event=recovered pods=%d ended=%d half_made=%d", len(kept), len(ended), len(unwritten))
        return Recovered(tuple(kept), tuple(ended))

    async def _adopt(self, found: Sequence[FoundLink], kept: list[Attachment]) -> list[FoundLink]:
        """Take whole links that the ledger does not know into it and `kept`; return the others.

        Rows come before links and go after them, so a lost or damaged ledger is the only way to such a link.
        """
        others = [each for each in found if not (_alive(each) and each.addresses and each.mac)]
        for each in found:
            if each in others:
                continue
            attachment = _attachment(each)
            try:
                await self._ledger.run(partial(Ledger.adopt, attachments=[attachment]))
            except LedgerError as error:
                if error.cause is not Cause.TAKEN:
                    raise
                log.error("event=adopt-failed link=%s error=%r", each.link, str(error))
                others.append(each)
            else:
                log.warning("event=adopted link=%s pod=%s", each.link, attachment)
                kept.append(attachment)
        return others

    async def _restore(self, attachments: Sequence[Attachment]) -> None:
        for attachment in attachments:
            try:
                await self._wiring.restore(attachment)
                log.warning("event=restored pod=%s link=%s", attachment, attachment.link)
            except WiringError as error:
                log.error("event=restore-failed pod=%s error=%r", attachment, str(error))

    async def _end(self, links: Sequence[str], attachments: Sequence[Attachment]) -> None:
        """The rules of these are no concern here: the first commit after the start leaves them out."""
        await self._wiring.retire([*links, *(each.link for each in attachments)])
        await self._wiring.retire_shapers([each.link for each in self._current.values()])
        await self._wiring.remove()
        departures = [self._departures.begin(each, isolated=True) for each in attachments]
        await _within(UNDO_LIMIT_S, asyncio.gather(*(each.gone.wait() for each in departures)))

    # What the commands share

    async def _rules_in(self, attachment: Attachment) -> None:
        limit_s = self._settings.add_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._datapath.attached(attachment)
        except TimeoutError as error:
            raise CniError(
                spec.TRY_AGAIN_LATER, f"the rules of Pod {attachment} were not in force after {limit_s:g} s"
            ) from error

    async def _rules_out(self, attachment: Attachment) -> None:
        limit_s = self._settings.add_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._datapath.detached(attachment)
        except TimeoutError as error:
            raise WiringError(
                f"the rules of Pod {attachment} were still there after {limit_s:g} s"
            ) from error

    async def _to_its_end(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Await work that goes on when the caller no longer waits."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ran)
        return await asyncio.shield(task)

    def _ran(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # it was told to the caller, or there is none

    @asynccontextmanager
    async def _serial(self, container_id: str) -> AsyncIterator[None]:
        """One request of a container at a time."""
        lock, users = self._locks.get(container_id) or (asyncio.Lock(), 0)
        self._locks[container_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(container_id)
            if users > 1:
                self._locks[container_id] = lock, users - 1

    def _holding(self) -> Iterator[Attachment]:
        """Those whose rules may be in force, now or soon."""
        yield from self._current.values()
        yield from self._adding.values()
        yield from self._departures.not_isolated()

    def _take_names(self, attachment: Attachment) -> None:
        self._links.add(attachment.link)
        self._shapers.add(attachment.shaper)

    def _known(self) -> list[Row]:
        """What the ledger must hold, should it have to be written anew."""
        whole = [*self._current.values(), *self._departures]
        return [Row(each, True) for each in whole] + [Row(each, False) for each in self._adding.values()]


def _alive(link: FoundLink | None) -> bool:
    return link is not None and not link.retired


def _needs_repair(attachment: Attachment, link: FoundLink) -> bool:
    return not link.up or link.addresses != attachment.addresses or link.mac != attachment.mac


def _is_anonymous(attachment: Attachment) -> bool:
    return not attachment.ifname


def _attachment(found: FoundLink) -> Attachment:
    """The attachment that a link tells of."""
    key = found.key or AttachmentKey(found.link, "")
    return Attachment(
        container_id=key.container_id,
        ifname=key.ifname,
        link=found.link,
        namespace=found.namespace,
        pod=found.pod,
        pod_uid=found.pod_uid,
        addresses=found.addresses,
        mac=found.mac,
        host_mac=found.host_mac,
        mtu=found.mtu,
        port_mappings=found.port_mappings,
    )


async def _within(limit_s: float, work: Awaitable[object]) -> None:
    """Await work, but no longer than that."""
    try:
        async with asyncio.timeout(limit_s):
            await work
    except TimeoutError:
        pass
