"""The node agent: which parts there are, who feeds whom, and how it starts and ends.

    source --events--> store --changed--+--> rules   (reconciler) --> nftables
                                        +--> Services (reconciler) --> nftables, health checks
                                        +--> LoadBalancer addresses --> statuses, ARP and NDP
                                        +--> routes  (reconciler) --> routing tables, the Pods' MTU
    CNI binary --socket--> attachments --+--> wiring, ledger
                                         +--> rules: ADD waits for its commit
    when all of it works:  CNI configuration, then Node condition NetworkUnavailable=False

The end, whatever ends it, leaves everything in the kernel as it is: Pods keep their links, rules and routes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agent import (
    asked,
    bench,
    bugreport,
    calls,
    datapath,
    doctor,
    held,
    http,
    metrics,
    node,
    probe,
    proofs,
    services,
    trace,
    verify,
)
from agent import log as logs
from agent.cluster.errors import ApiError
from agent.cluster.model import Event, Node, Synced
from agent.config import Config, ConfigError, load
from agent.datapath import Datapath
from agent.files import hold
from agent.loadbalancer.balancer import LoadBalancer
from agent.nft.kernel import NftError
from agent.pod_status import PodStatus
from agent.pods.attachments import Attachments
from agent.pods.ledger import Ledger, LedgerError
from agent.pods.model import Attachment
from agent.pods.server import Server, ServerError
from agent.pods.wiring import Wiring, WiringError
from agent.policy_status import PolicyState
from agent.reconcile import Reconciler
from agent.repairs import Repairs
from agent.reports import Reports
from agent.routes.kernel import RouteError, RouteKernel
from agent.routes.plan import Uplink
from agent.routing import Routing
from agent.services import Services
from agent.sources import source_of

NODE = "node"  # the only key of its reconciler
ALIVE_S = 1.0
CLAIM_LIMIT_S = 2.0  # as long as another agent may need to end
REAP_S = 60.0
MOST_PROBLEMS = 100  # of objects, in the status
RESYNC_S = 300.0
GC_THRESHOLD = (50_000, 20, 10)
"""A large cluster's objects come at once and stay. To look for cycles among them all the while takes a
seventh of the start with 10,000 Services, and each look later on stops everything for a moment."""

log = logging.getLogger(__name__)


class StartError(Exception):
    """The agent cannot start; the message names the setting and what is in the way."""


class AnnounceError(Exception):
    """The runtime cannot be told that Pods can be attached; the message names the setting and why."""


class Agent:
    """One node's agent, made of its parts; `run` is its life."""

    def __init__(self, config: Config) -> None:
        """Raises LedgerError, OSError."""
        self.config = config
        self.source = source_of(config, dict.fromkeys((*datapath.KINDS, *services.KINDS)))
        self.route_kernel = RouteKernel(config.sysctl_dir)
        self.wiring = Wiring(config.sysctl_dir)
        self.repairs = Repairs(time.time)
        self.reports = Reports(self.source.tell)
        self.datapath = Datapath(
            config,
            reach=self.source.reach,
            find_pod=self.source.find_pod,
            local_addresses=self.route_kernel.local_addresses,
            reports=self.reports,
            committed=lambda: self._announcing.mark(NODE),
        )
        self.services = Services(
            config,
            self.datapath.store,
            self.datapath.kernel,
            local_addresses=self.route_kernel.local_addresses,
            reports=self.reports,
            committed=lambda: self._announcing.mark(NODE),
        )
        self.pod_status = PodStatus(self.source, lambda: self.datapath.store.snapshot)
        self.routing = Routing(
            config, self.route_kernel, self.datapath, found=self._use_link, routed=self._reachable
        )
        self._announcing = Reconciler[str]("announcement", self._announce, expected=(AnnounceError, ApiError))
        self._started = time.time()
        self.attachments = Attachments(
            config, Ledger(config.state_dir / "ledger.sqlite3", boot_id()), self.wiring, self
        )
        self._bench = bench.Bench(self.attachments)
        self.load_balancer = self._load_balancer()
        self._health = http.Health(self.not_ready_all)

    def _load_balancer(self) -> LoadBalancer | None:
        if not self.config.load_balancer_pools:
            return None
        return LoadBalancer(self.config, self.datapath.store, self.source, self.reports, self.not_ready)

    # When the way to other nodes is known

    def _use_link(self, uplink: Uplink) -> None:
        if self.load_balancer:
            self.load_balancer.use_link(uplink.name, uplink.index)

    def _reachable(self) -> None:
        self.attachments.set_mtu(self.routing.pod_mtu)
        self._announcing.mark(NODE)

    # What attachments ask: rules of the datapath, and whether Pods can be reached at all

    async def attached(self, attachment: Attachment) -> None:
        """Return when the Pod's rules are in force, and then its ports of the node."""
        await self.datapath.attached(attachment)
        await self.services.attached(attachment)
        self.pod_status.attached(attachment)

    async def detached(self, attachment: Attachment) -> None:
        """Return when no rule speaks of the Pod any more."""
        self.pod_status.detached(attachment)
        await self.services.detached(attachment)
        await self.datapath.detached(attachment)

    def not_ready(self) -> str:
        """Why no Pod can be put on the network now; "" when one can."""
        if reason := self.datapath.not_ready() or self.services.not_ready():
            return "; ".join([reason, *self.source.problems()])
        if self.config.node_name not in self.datapath.store.snapshot.nodes:
            return f"there is no Node {self.config.node_name} in {self.config.cluster}: see node_name"
        return self.routing.not_ready()

    def not_ready_all(self) -> list[str]:
        """Everything in the way of Pods, for /readyz and status."""
        reason = self.attachments.not_ready()
        errors = [f"{each.name}: {each.error}" for each in self._reconcilers() if each.error]
        return [reason, *errors] if reason else errors

    def _reconcilers(self) -> tuple[Reconciler[Any], ...]:
        return (
            self.datapath.reconciler,
            self.services.reconciler,
            self.services.ended_flows,
            self.routing.reconciler,
            self._announcing,
        )

    # Life

    async def run(self) -> None:
        """Serve until cancelled. Raises what makes serving impossible, named for its reader."""
        handlers = calls.handlers(self.attachments, self.status, self._questions())
        server = Server(self.config.socket, handlers, calls.observe)
        web = self._listen()
        work: asyncio.Task[None] | None = None
        try:
            await self.datapath.kernel.start()
            adopted = (await self.attachments.recover()).adopted
            self.datapath.adopt(adopted)
            self.services.adopt(adopted)
            self.pod_status.adopt(adopted)
            await server.start()
            metrics.STATE.version, metrics.STATE.kernel = version("podwall"), os.uname().release
            log.info("event=started node=%s version=%s", self.config.node_name, version("podwall"))
            work = asyncio.create_task(self._work())
            await asyncio.shield(work)
        finally:
            if self.load_balancer:
                await self.load_balancer.close()
            # Requests under way end while rules are still committed: without them they would wait in vain.
            await server.stop()
            await self._bench.close()
            await self.attachments.close()
            if work:
                await _ended(work)
            await self.datapath.kernel.stop()
            await self.route_kernel.close()
            await self.wiring.close()
            self.source.close()
            if web:
                web.close()
            log.info("event=stopped node=%s", self.config.node_name)

    def _questions(self) -> Mapping[str, calls.Answer]:
        """What is answered on the socket beside the CNI's calls and the status."""
        holdings = held.Holdings(
            self.config,
            self.datapath,
            self.services,
            self.attachments,
            self.load_balancer,
            lambda: self.routing.plan,
        )
        subject = proofs.Subject(
            self.config,
            self.datapath.kernel,
            {"Pods and policies": self.datapath.rules, "Services": self.services.rules},
            snapshot=lambda: self.datapath.store.snapshot,
            plan=lambda: self.routing.plan,
            pod_mtu=lambda: self.routing.pod_mtu,
            altered=self._distrust_rules,
            status=self.status,
            reach=self.source.reach,
        )
        return {
            **asked.answers(self.datapath),
            **probe.answers(self._inside),
            **trace.answers(self.datapath, self._inside),
            **held.answers(holdings),
            **proofs.answers(subject),
            **doctor.answers(self._known),
            **bugreport.answers(self.config),
            **verify.answers(self._verified()),
            **self._bench.answers(),
        }

    def _verified(self) -> verify.Subject:
        """What `podwall why` asks the kernel's rules through."""
        balancer = self.load_balancer
        return verify.Subject(
            self.config,
            self.datapath.kernel,
            links=self.datapath.links,
            local=self.route_kernel.local_addresses,
            serving=lambda: (self.services.serving, self.services.why()),
            announced=lambda: sorted(map(str, balancer.announced())) if balancer else [],
            tunnels=lambda: sorted({path.node for path in self.routing.plan.paths if path.way == "vxlan"}),
        )

    def _known(self) -> doctor.Known:
        """What `podwall doctor` is told beside what it looks at itself."""
        snapshot = self.datapath.store.snapshot
        own = snapshot.nodes.get(self.config.node_name)
        problems = [f"{each.kind} {each.object}: {each.problem}" for each in self.reports.current()]
        addresses = self.attachments.addresses.use()
        return doctor.Known(
            self.config,
            own=own,
            peers=[node for node in snapshot.nodes.values() if node is not own],
            ways=self.routing.plan.paths,
            pod_mtu=self.routing.pod_mtu,
            underlay=self.routing.plan.underlay.version if self.routing.plan.underlay else 4,
            pod_cidrs=[cidr for node in snapshot.nodes.values() for cidr in node.pod_cidrs],
            agent={
                "not_ready": self.not_ready_all(),
                "problems": list(self.routing.problems),
                "services": "on" if self.services.serving else "off",
                "addresses": [{**each._asdict(), "cidr": str(each.cidr)} for each in addresses],
                "object_problems": len(problems),
                "first_object_problem": problems[0] if problems else "",
            },
        )

    def _distrust_rules(self) -> None:
        self.datapath.resync()
        self.services.resync()

    def _inside(self, namespace: str, name: str) -> probe.Inside | str | None:
        """From where connections of a Pod are tried and traced."""
        return probe.inside_of(
            namespace,
            name,
            attachments=self.attachments.current.values(),
            pods=self.datapath.store.snapshot.pods,
            node=self.config.node_name,
        )

    def _listen(self) -> http.Server | None:
        """Serve the local port, where one is configured. Raises ServerError naming the setting."""
        if not self.config.http_address:
            return None
        try:
            return http.Server(self.config.http_address, self._health)
        except OSError as error:
            raise ServerError(
                f"http_address {self.config.http_address} cannot be served: {error.strerror or error}"
            ) from error

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.source.run(self._take))
            tasks.create_task(self.reports.run())
            tasks.create_task(self.datapath.reconcile())
            tasks.create_task(self.services.run())
            tasks.create_task(self._repair_rules())
            tasks.create_task(self.datapath.denials.run())
            tasks.create_task(self.datapath.ended_flows.loop())
            if self.load_balancer:
                tasks.create_task(self.load_balancer.run())
            tasks.create_task(self.routing.reconciler.loop())
            tasks.create_task(self.routing.repair())
            tasks.create_task(self._announcing.loop())
            tasks.create_task(self.pod_status.reconciler.loop())
            tasks.create_task(_every(ALIVE_S, self._sign_of_life))
            tasks.create_task(_every(REAP_S, self._reap))
            tasks.create_task(_every(RESYNC_S, self._resync))

    def _take(self, event: Event) -> None:
        """Take one event of the cluster; mark what may have changed by it."""
        changed = self.datapath.take(event)
        self.services.take(event, changed)
        self.pod_status.take(changed)
        if self.load_balancer:
            self.load_balancer.take(event, changed)
        if isinstance(event, Synced) and event.kind == "Node":
            self.routing.mark()  # to say that there is no plan, when there is no Node
        if any(each.kind == "Node" for each in changed):
            self.routing.mark()
            self._announcing.mark(NODE)
            self._take_pod_cidrs(self.datapath.store.snapshot.nodes.get(self.config.node_name))

    def _take_pod_cidrs(self, own: Node | None) -> None:
        """With one podCIDR that is none Pods would lack a family: better no Pods until it is mended."""
        if own is None:
            self.attachments.set_pod_cidrs((), f"the cluster has no Node {self.config.node_name}")
        elif bad := [str(each) for each in own.problems if each.field.startswith("spec.podCIDR")]:
            self.attachments.set_pod_cidrs((), f"Node {own.name}: {'; '.join(bad)}")
        else:
            self.attachments.set_pod_cidrs(own.pod_cidrs)

    async def _repair_rules(self) -> None:
        """Undo foreign changes of podwall's tables."""
        async for foreign in self.datapath.kernel.changes():
            metrics.REPAIRS.inc()
            self.repairs.note(foreign)
            tables = ",".join(sorted(f"{table.family}/{table.name}" for table in foreign.tables))
            log.warning("event=foreign-change tables=%s lost=%s", tables, foreign.lost)
            if foreign.lost or foreign.tables & datapath.TABLES:
                self.datapath.resync()
            if foreign.lost or foreign.tables & services.TABLES:
                self.services.resync()

    async def _resync(self) -> None:
        self._distrust_rules()
        self.routing.mark()

    async def _reap(self) -> None:
        reaped = await self.attachments.reap()
        if reaped:
            log.warning("event=reaped pods=%d", reaped)

    async def _sign_of_life(self) -> None:
        self._health.alive()
        metrics.PODS.set(len(self.attachments.current))
        self.datapath.show_policies()
        self._show_state()

    def _show_state(self) -> None:
        state = metrics.STATE
        state.ready = not self.not_ready_all()
        state.failing = {each.name: each.error is not None for each in self._reconcilers()}
        state.watches = self.source.watches()
        state.addresses = self.attachments.addresses.use()
        state.commits = {
            "pods": self.datapath.rules.last_commit,
            "services": self.services.rules.last_commit,
        }

    async def _announce(self, _: frozenset[str]) -> None:
        """When Pods can be attached: tell the runtime, then the cluster. Raises AnnounceError, ApiError."""
        if self.attachments.not_ready():
            return
        directory = self.config.cni_conf_dir
        try:
            written = await asyncio.to_thread(node.write_conflist, directory, self.config.socket)
        except OSError as error:
            raise AnnounceError(f"cni_conf_dir {directory} cannot be written: {error.strerror}") from error
        if written:
            log.info("event=conflist-written directory=%s", directory)
        own = self.datapath.store.snapshot.nodes.get(self.config.node_name)
        if own and own.network_unavailable is not False:
            await self.source.network_available(own.name)

    # What the agent says of itself

    def status(self) -> Mapping[str, object]:
        """Versions, state and counts, for `podwall status`; times are seconds since the epoch."""
        return {
            "node": self.config.node_name,
            "version": version("podwall"),
            "kernel": os.uname().release,
            "started": self._started,
            "not_ready": self.not_ready_all(),
            "pods": len(self.attachments.current),
            "addresses": [
                {"cidr": str(each.cidr), "used": each.used, "resting": each.resting, "size": each.size}
                for each in self.attachments.addresses.use()
            ],
            "paths": [
                {"node": path.node, "cidr": str(path.cidr), "way": path.way}
                for path in self.routing.plan.paths
            ],
            "problems": [*map(str, self.routing.sysctl_problems), *self.routing.problems],
            "object_problems": [report.to_json() for report in self.reports.current()[:MOST_PROBLEMS]],
            "object_problems_total": len(self.reports.current()),
            "denied_packets_seen": self.datapath.denials.packets,
            "commits": self.datapath.rules.commits,
            "last_commit": self.datapath.rules.last_commit,
            "last_check": self.datapath.rules.last_check,
            "repairs": self.repairs.status(),
            "policies": _policies(self.datapath.policy_states()),
            "watches": self.source.watches(),
            "services": self.services.status(),
            "load_balancer": self.load_balancer.status() if self.load_balancer else None,
        }


def _policies(states: Sequence[PolicyState]) -> Mapping[str, int]:
    """How many policies select Pods of this node, how many of them wait, and how many are in audit mode."""
    return {
        "selecting": len(states),
        "waiting": sum(state.waiting for state in states),
        "audit": sum(state.mode == "audit" for state in states),
    }


async def _every(seconds: float, do: Callable[[], Awaitable[None]]) -> None:
    """Do it now and again; a failure is logged and waits for the next time."""
    while True:
        try:
            await do()
        except Exception as error:
            log.exception("event=periodic-failed what=%s error=%r", do.__name__, str(error))
        await asyncio.sleep(seconds)


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what it failed with has been raised where it was awaited."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def boot_id() -> str:
    """What tells this boot of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def claim(directory: Path) -> int:
    """Make this the only agent that uses a directory; holds until the descriptor or the process ends.

    Two agents on one ledger would clear away each other's Pods. Raises StartError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return hold(directory, CLAIM_LIMIT_S)
    except TimeoutError:
        raise StartError(f"another agent uses state_dir {directory}: end it first") from None
    except OSError as error:
        raise StartError(f"state_dir {directory} cannot be used: {error.strerror}") from error


async def _until_signalled(config: Config) -> None:
    agent = Agent(config)
    life = asyncio.create_task(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, life.cancel)
    with suppress(asyncio.CancelledError):
        await life


def main() -> None:
    """Run the agent until SIGTERM or SIGINT; exit status 1 when it cannot, 2 for a bad configuration."""
    try:
        config = load(sys.argv[1:], os.environ)
    except ConfigError as error:
        print(f"podwall-agent: {error}", file=sys.stderr)
        sys.exit(2)
    logs.start(config.log_level)
    gc.set_threshold(*GC_THRESHOLD)
    try:
        claim(config.state_dir)
        asyncio.run(_until_signalled(config))
    except* (LedgerError, NftError, OSError, RouteError, ServerError, StartError, WiringError) as errors:
        for each in _leaves(errors):
            log.error("event=failed error=%r", str(each))
        sys.exit(1)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterable[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    main()
