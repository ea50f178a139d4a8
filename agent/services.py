"""Services in nftables: from cluster objects to commits in a table of their own, and what follows a commit.

    store --changed--> Service compiler --+
                                          |owners| --> reconciler --> Rules --> one transaction
    attached Pods --ports of the node-----+                             |
                                                                        +--> UDP and SCTP flows that must end
    kube-proxy's rules --looked for--> on or off                        +--> health checks
                                                                        +--> what is wrong in objects

The table, its transactions and its retries are apart from those of Pods and policies, so that a Service that
the kernel refuses stops no Pod.

Setting `services`:

    on     always
    off    never: only ports of the node that lead to Pods (hostPort) are in the table
    auto   on, unless kube-proxy's rules are in this network namespace (`agent.kube_proxy` says when that is)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from datetime import datetime

from agent import kube_proxy, metrics
from agent.cluster.model import EndpointSlice, Event, IPAddress, Kind, Object, Synced
from agent.cluster.store import Changed, Name, Store
from agent.compile import service_chains
from agent.compile.hostports import host_ports
from agent.compile.names import SERVICES_TABLE
from agent.compile.service import Backends, ServiceSettings
from agent.compile.services import ServiceCompiler
from agent.config import Config
from agent.conntrack import ConntrackError
from agent.health_checks import Check, HealthChecks
from agent.nft.kernel import Kernel, NftError
from agent.nft.model import Item, Owner
from agent.pods.model import Attachment
from agent.reconcile import Reconciler
from agent.reports import Reports
from agent.routes.kernel import RouteError
from agent.rules import TolerantRules
from agent.service_flows import (
    Destination,
    Places,
    Target,
    begins_tcp,
    concerns_datagrams,
    end_stale,
    removed_frontends,
    target_of,
)

KINDS: tuple[Kind, ...] = ("Node", "Service", "EndpointSlice")
"""What the rules are made of."""

TABLES = frozenset({SERVICES_TABLE})
HOST_PORT = "host-port"  # the first word of who owns an attachment's ports of the node
ISOLATED = frozenset({"service", HOST_PORT})  # whose change may be refused without stopping others
FLOWS = "flows"  # the only key of its reconciler
TRIGGERED = "endpoints.kubernetes.io/last-change-trigger-time"
ORPHANS_EVERY_S = 60.0
BEHIND_EVERY_S = 30.0  # how often what was refused is tried again, though nothing of it changed

LocalAddresses = Callable[[], Awaitable[frozenset[IPAddress]]]

log = logging.getLogger(__name__)


class HostPortError(Exception):
    """The kernel refused what leads ports of the node to a Pod."""


class Services:
    """Keeps the rules of Services as the cluster says, and those of the ports that Pods have of the node.

    `local_addresses` are the node's own; `committed` is called after each successful commit.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        kernel: Kernel,
        *,
        local_addresses: LocalAddresses,
        reports: Reports,
        committed: Callable[[], None],
    ) -> None:
        self.rules = TolerantRules(kernel, self._compile, TABLES, lambda owner: owner[0] in ISOLATED)
        self.reconciler = Reconciler[Owner]("services", self._run, expected=NftError)
        self.ended_flows = Reconciler[str](
            "service-flows", self._end_flows, expected=(ConntrackError, RouteError)
        )
        self.health_checks = HealthChecks()
        self.serving = config.services != "off"
        self._config = config
        self._store = store
        self._local_addresses = local_addresses
        self._reports = reports
        self._committed = committed
        self._choice = kube_proxy.Choice()
        self._compiler = self._new_compiler()
        self._fed = False
        self._synced = asyncio.Event()
        self._host_ports: dict[Owner, Attachment] = {}
        self._flows_concerned = True  # flows that began before this agent did
        self._gone: set[Destination] = set()
        self._tcp_begins = False  # a frontend of TCP was added since flows were last looked at
        self._triggered: list[float] = []
        self._heard: Counter[Kind] = Counter()  # changes that no commit has had yet
        self._told: Mapping[Name, tuple[str, ...]] = {}
        self._orphans: frozenset[Name] = frozenset()

    # What attachments ask

    async def attached(self, attachment: Attachment) -> None:
        """Return when the Pod's ports of the node lead to it. Raises HostPortError."""
        if not attachment.port_mappings:
            return
        owner = self._attach(attachment)
        await self.reconciler.settle(owner)
        if why := self.rules.behind.get(owner):
            raise HostPortError(f"its ports of the node are not in force: nftables says {why}")

    async def detached(self, attachment: Attachment) -> None:
        """Return when no port of the node leads to the Pod any more."""
        owner = _owner(attachment)
        if self._host_ports.pop(owner, None) and self._may_commit():
            await self.reconciler.settle(owner)

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """These Pods are on the node already; they are part of the first commit."""
        for attachment in attachments:
            if attachment.port_mappings:
                self.reconciler.mark(self._attach(attachment))
        self.reconciler.mark(service_chains.STATIC)

    def not_ready(self) -> str:
        """Why Pods would find no Services, nor have ports of the node; "" when all is in force."""
        if not self._may_commit():
            missing = [kind for kind in KINDS if kind not in self._store.synced]
            return f"waiting for the first list of {', '.join(missing)} from {self._config.cluster}"
        if self.rules.last_check is None:
            error = self.reconciler.error or "first commit under way"
            return f"the rules of Services are not in the kernel yet: {error}"
        return ""

    # What the agent tells

    def take(self, event: Event, changed: tuple[Changed, ...]) -> None:
        """Take what an event of the cluster changed in the store."""
        if isinstance(event, Synced) and all(kind in self._store.synced for kind in KINDS):
            self._synced.set()
        of_ours = tuple(each for each in changed if each.kind in KINDS)
        if not of_ours or not self._fed:
            return
        self.reconciler.mark(*self._compiler.apply(of_ours))
        metrics.SERVICES_QUEUED.set_to_current_time()
        for each in of_ours:
            if each.kind in metrics.CHANGES:
                metrics.CHANGES[each.kind].inc()
                self._heard[each.kind] += 1
                metrics.PENDING[each.kind].set(self._heard[each.kind])
            self._flows_concerned |= concerns_datagrams(each)
            if self.rules.last_check is not None and (at := _trigger_time(each)):
                self._triggered.append(at)

    def resync(self) -> None:
        """Compare the kernel with what it should hold, as a whole."""
        self.rules.distrust()
        self.reconciler.mark(service_chains.STATIC)

    async def run(self) -> None:
        """Work until cancelled. Nothing is committed, nor pruned, before every kind has been listed."""
        try:
            if self._config.services == "auto":
                await self._look()
            if self._config.services != "off":
                await self._synced.wait()
            self._feed()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.reconciler.loop())
                tasks.create_task(self.ended_flows.loop())
                tasks.create_task(self._find_orphans())
                tasks.create_task(self._keep_trying())
                if self._config.services == "auto":
                    tasks.create_task(self._keep_looking())
        finally:
            await self.health_checks.close()

    def status(self) -> Mapping[str, object]:
        """Whether Services are served and why, and how many there are; times are seconds since the epoch."""
        services = self._store.snapshot.services
        return {
            "state": "on" if self.serving else "off",
            "why": self.why(),
            "services": len(services),
            "endpoint_slices": len(self._store.snapshot.slices),
            "commits": self.rules.commits,
            "last_commit": self.rules.last_commit,
            "last_check": self.rules.last_check,
            "health_checks": [
                {"service": "/".join(key), "port": check.port, "local_endpoints": check.local}
                for key, check in sorted(self._checks().items())
            ],
            "problems": {"/".join(key): list(said) for key, said in sorted(self.problems().items())},
        }

    def why(self) -> str:
        """What made Services on or off."""
        if self._config.services != "auto":
            return f"services: {self._config.services}"
        if self.serving:
            return "services: auto, and no rules of kube-proxy are on this node"
        return (
            f"services: auto, and kube-proxy's rules are on this node ({self._choice.found}); "
            "if it no longer runs, remove them with kube-proxy --cleanup, or set services: on"
        )

    async def _keep_trying(self) -> None:
        while True:
            await asyncio.sleep(BEHIND_EVERY_S)
            self.reconciler.mark(*self.rules.behind)

    # On or off

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(kube_proxy.LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        """Look for kube-proxy's rules, and serve or step aside. What cannot be seen changes nothing."""
        try:
            found = await asyncio.to_thread(kube_proxy.seen)
        except OSError as error:
            log.error("event=kube-proxy-not-looked-for error=%r", str(error))
            return
        if self._choice.look(found):
            self._serve(bool(self._choice.serve))
            level, state = (logging.INFO, "on") if self.serving else (logging.WARNING, "off")
            log.log(level, "event=services state=%s why=%r", state, self.why())

    def _serve(self, on: bool) -> None:
        if on == self.serving:
            return
        self.serving, before = on, self._compiler.owners
        self._compiler, self._fed = self._new_compiler(), False
        self.reconciler.mark(*before)
        if self._may_commit():
            self._feed()

    def _feed(self) -> None:
        """Let the compiler have all that there is at once, so that no Service is compiled twice."""
        if self.serving:
            self._compiler.apply(self._everything())
        self._fed = self.serving
        self._flows_concerned = True
        self.reconciler.mark(*self._compiler.owners)

    def _new_compiler(self) -> ServiceCompiler:
        settings = ServiceSettings(
            enabled=self.serving,
            external_ips=self._config.external_ips,
            node_port_addresses=self._config.node_port_addresses,
            pools=tuple(network for pool in self._config.load_balancer_pools for network in pool.networks()),
        )
        return ServiceCompiler(self._config.node_name, settings)

    def _everything(self) -> Iterator[Changed]:
        now = self._store.snapshot
        objects: Iterable[tuple[Kind, Mapping[str, Object] | Mapping[Name, Object]]] = (
            ("Node", now.nodes),
            ("Service", now.services),
            ("EndpointSlice", now.slices),
        )
        for kind, there in objects:
            for key, item in there.items():
                yield Changed(kind, key, None, item)

    # Rules

    def _may_commit(self) -> bool:
        return self._config.services == "off" or self._synced.is_set()

    def _attach(self, attachment: Attachment) -> Owner:
        owner = _owner(attachment)
        self._host_ports[owner] = attachment
        return owner

    def _compile(self, owner: Owner) -> Iterable[Item]:
        """The items of one owner, from what is known now; nothing when it is gone."""
        if owner[0] != HOST_PORT:
            return self._compiler.items(owner)
        attachment = self._host_ports.get(owner)
        if attachment is None:
            return ()
        named = attachment.namespace, attachment.pod
        return host_ports(attachment.addresses, attachment.port_mappings, *named)

    async def _run(self, owners: frozenset[Owner]) -> None:
        begun = time.perf_counter()
        concerned, self._flows_concerned = self._flows_concerned, False
        triggered, self._triggered = self._triggered, []
        heard = self._heard.copy()
        try:
            changes = await self.rules.run(owners)
        except BaseException:
            metrics.SERVICES_FAILURES.inc()
            self._flows_concerned |= concerned
            self._triggered += triggered
            raise
        self._show_synced(heard)
        gone = removed_frontends(changes, serving=self.serving)
        self._gone |= gone
        self._tcp_begins |= (begins := begins_tcp(changes))
        if concerned or gone or begins or any(owner[0] == HOST_PORT for owner in owners):
            self.ended_flows.mark(FLOWS)
        await self.health_checks.want(self._checks())
        self._report()
        metrics.SERVICES_SYNC_SECONDS.observe(time.perf_counter() - begun)
        for at in triggered:
            metrics.SERVICES_PROGRAMMING_SECONDS.observe(max(time.time() - at, 0.0))
        metrics.SERVICES.set(len(self._store.snapshot.services) if self.serving else 0)
        self._committed()

    def _show_synced(self, heard: Mapping[Kind, int]) -> None:
        """These changes are in force; those heard of meanwhile are not yet."""
        metrics.SERVICES_SYNCED.set_to_current_time()
        self._heard.subtract(heard)
        for kind, pending in metrics.PENDING.items():
            pending.set(self._heard[kind])

    def _checks(self) -> Mapping[Name, Check]:
        if not self.serving:
            return {}
        return {key: Check(*check) for key, check in self._compiler.health_checks().items()}

    # What is asked

    def lists(self, key: Name) -> tuple[Backends, ...]:
        """The endpoints that this node's rules lead a Service's clients to."""
        return self._compiler.lists(key)

    def problems(self) -> Mapping[Name, tuple[str, ...]]:
        """What of each Service is not served as it is written, or refused by the kernel."""
        problems = dict(self._compiler.problems()) if self.serving else {}
        for owner, why in self.rules.behind.items():
            if owner[0] == "service":
                key = owner[1], owner[2]
                problems[key] = (*problems.get(key, ()), f"nftables refuses its rules: {why.splitlines()[0]}")
        for key, said in self.health_checks.problems.items():
            problems[key] = (*problems.get(key, ()), said)
        return problems

    def _report(self) -> None:
        problems, services = self.problems(), self._store.snapshot.services
        for key in self._told.keys() | problems.keys():
            if self._told.get(key) != problems.get(key):
                uid = services[key].uid if key in services else ""
                self._reports.set("Service", key, uid, "service", problems.get(key, ()))
        self._told = problems

    async def _find_orphans(self) -> None:
        """Tell of slices that belong to a Service that there is not; those of one just removed go soon."""
        before: frozenset[Name] = frozenset()
        while True:
            now = self._store.snapshot
            orphans = frozenset(
                key
                for service in now.slices_by_service.keys() - now.services.keys()
                for key in now.slices_of(service)
            )
            for key in self._orphans - orphans:
                self._reports.set("EndpointSlice", key, "", "service", ())
            for key in orphans & before:
                of = now.slices[key]
                problem = (
                    f"label kubernetes.io/service-name: there is no Service {of.namespace}/{of.service}, "
                    "so its endpoints get no traffic"
                )
                self._reports.set("EndpointSlice", key, of.uid, "service", (problem,))
            self._orphans, before = orphans & before, orphans
            await asyncio.sleep(ORPHANS_EVERY_S)

    # Flows

    async def _end_flows(self, _: frozenset[str]) -> None:
        """End the flows that nobody translates as they are any more. Raises ConntrackError, RouteError."""
        gone = frozenset(self._gone)
        local = await self._local_addresses()
        nodes = frozenset(ip for node in self._store.snapshot.nodes.values() for ip in node.internal_ips)

        def where(to: Destination) -> Target | None:
            serving_at = self._compiler.serving_at if self.serving else None
            places = Places(local, nodes, self._config.node_port_addresses)
            return target_of(to, serving_at, self._host_ports.values(), places)

        tcp, self._tcp_begins = self._tcp_begins, False
        try:
            ended = await end_stale(where, gone, local | nodes, tcp=tcp)
        except BaseException:
            self._tcp_begins |= tcp
            raise
        self._gone -= gone
        if ended.ended:
            metrics.SERVICE_FLOWS_ENDED.inc(ended.ended)
            log.info("event=service-flows-ended ended=%d gone=%d", ended.ended, ended.gone)


def _owner(attachment: Attachment) -> Owner:
    return (HOST_PORT, attachment.container_id, attachment.ifname)


def _trigger_time(change: Changed) -> float | None:
    """When the change of Pods or Service was that made a slice another, in seconds since the epoch."""
    before, after = change.before, change.after
    if not isinstance(after, EndpointSlice):
        return None
    text = after.annotations.get(TRIGGERED, "")
    if not text or (isinstance(before, EndpointSlice) and before.annotations.get(TRIGGERED) == text):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None
