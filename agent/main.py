"""The node agent: which parts there are, who feeds whom, and how it starts and ends.

    source --events--> store --changed--+--> rules   (reconciler) --> nftables
                                        +--> routes  (reconciler) --> routing tables, the Pods' MTU
    CNI binary --socket--> attachments --+--> wiring, ledger
                                         +--> rules: ADD waits for its commit
    when all of it works:  CNI configuration, then Node condition NetworkUnavailable=False

The end, whatever ends it, leaves everything in the kernel as it is: Pods keep their links, rules and routes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from agent import calls, http, metrics, node
from agent import log as logs
from agent.cluster.model import Event, Kind, Synced
from agent.cluster.store import Store
from agent.compile import links, tunnel
from agent.config import Config, ConfigError, load
from agent.nft.kernel import Kernel, NftError
from agent.nft.model import Item, Owner
from agent.pods.attachments import Attachments
from agent.pods.ledger import Ledger, LedgerError
from agent.pods.model import Attachment
from agent.pods.server import Server, ServerError
from agent.pods.wiring import Wiring, WiringError
from agent.reconcile import Reconciler
from agent.routes.kernel import RouteError, RouteKernel
from agent.routes.plan import Plan, plan_routes, pod_mtu
from agent.rules import Rules
from agent.sources import source_of

KINDS: tuple[Kind, ...] = ("Node",)
"""What the agent watches."""

ROUTES, NODE = "routes", "node"  # the only keys of their reconcilers
ALIVE_S = 1.0
REAP_S = 60.0
RESYNC_S = 300.0

log = logging.getLogger(__name__)


class Agent:
    """One node's agent, made of its parts; `run` is its life."""

    def __init__(self, config: Config) -> None:
        """Raises LedgerError, OSError."""
        self.config = config
        self.store = Store()
        self.kernel = Kernel()
        self.rules = Rules(self.kernel, self._compile)
        self.route_kernel = RouteKernel()
        self.wiring = Wiring()
        self.plan = Plan()
        self.route_problems: tuple[str, ...] = ()
        self.sysctl_problems: tuple[node.SysctlProblem, ...] = ()
        self._rules = Reconciler[Owner]("rules", self._run_rules)
        self._routes = Reconciler[str]("routes", self._sync_routes)
        self._announcing = Reconciler[str]("announcement", self._announce)
        self._source = source_of(config, KINDS)
        self._synced = asyncio.Event()
        self._routed = False
        self._attached: dict[Owner, Attachment] = {}
        self._started = time.time()
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.attachments = Attachments(
            config, Ledger(config.state_dir / "ledger.sqlite3", boot_id()), self.wiring, self
        )
        self._health = http.Health(self.not_ready_all)

    # The Pods' rules: what attachments ask of the agent

    async def attached(self, attachment: Attachment) -> None:
        """Return when the Pod's rules are in force."""
        owner = links.link_owner(attachment.container_id, attachment.ifname)
        self._attached[owner] = attachment
        await self._rules.settle(owner)

    async def detached(self, attachment: Attachment) -> None:
        """Return when no rule speaks of the Pod any more.

        Before the cluster has been listed nothing is committed, and no Pod added that could get the address:
        the first commit leaves this one out.
        """
        owner = links.link_owner(attachment.container_id, attachment.ifname)
        self._attached.pop(owner, None)
        if self._synced.is_set():
            await self._rules.settle(owner)

    def not_ready(self) -> str:
        """Why the datapath cannot take a Pod now; "" when it can."""
        missing = [kind for kind in KINDS if kind not in self.store.synced]
        if missing:
            return f"waiting for the first list of {', '.join(missing)} from {self.config.cluster}"
        if self.rules.last_check is None:
            return f"the rules are not in the kernel yet: {self._rules.error or 'first commit under way'}"
        if not self._routed:
            return f"the routes are not in the kernel yet: {self._routes.error or 'first sync under way'}"
        return ""

    def not_ready_all(self) -> list[str]:
        """Everything in the way of Pods, for /readyz and status."""
        reason = self.attachments.not_ready()
        errors = [f"{each.name}: {each.error}" for each in (self._rules, self._routes) if each.error]
        return [reason, *errors] if reason else errors

    # Desired state

    def _compile(self, owner: Owner) -> Iterable[Item]:
        """The items of one owner, from what is known now; nothing when it is gone."""
        if owner == links.STATIC:
            return links.static(self.config.masquerade)
        if owner == links.CLUSTER:
            return links.cluster(self.store.snapshot.nodes.values())
        if owner == tunnel.TUNNEL:
            nodes = self.store.snapshot.nodes.values()
            return tunnel.items(self.config.node_name, nodes, self.plan, self.config.masquerade)
        attachment = self._attached.get(owner)
        if attachment is None:
            return ()
        return links.link(attachment.link, attachment.addresses, attachment.namespace, attachment.pod)

    async def _run_rules(self, owners: frozenset[Owner]) -> None:
        first = self.rules.last_check is None
        await self.rules.run(owners)
        if first:
            self._announcing.mark(NODE)

    async def _sync_routes(self, _: frozenset[str]) -> None:
        """Bring the routes to all Nodes into the kernel; without an own Node there is nothing to do yet."""
        config, nodes = self.config, self.store.snapshot.nodes
        own = nodes.get(config.node_name)
        if own is None:
            return
        uplink = await self.route_kernel.uplink(own.internal_ips)
        plan = plan_routes(
            config.node_name,
            nodes.values(),
            uplink,
            config.mode,
            vxlan_id=config.vxlan_id,
            vxlan_port=config.vxlan_port,
        )
        await self._settle_sysctls(uplink.name, {cidr.version for cidr in own.pod_cidrs})
        changed, self.plan = plan != self.plan, plan
        if changed and plan.vxlan:  # nobody may speak into a tunnel that is not guarded yet
            await self._rules.settle(tunnel.TUNNEL)
        changes = await self.route_kernel.sync(plan)
        if changed and not plan.vxlan:
            self._rules.mark(tunnel.TUNNEL)
        self.attachments.set_mtu(pod_mtu(config.mode, plan, uplink.mtu))
        self._routed = True
        self._announcing.mark(NODE)
        self._report_route_problems((*map(str, plan.problems), *changes.problems))
        for step in changes.done:
            log.info("event=routed step=%r", str(step))
        metrics.ROUTES.labels("direct").set(sum(path.way == "direct" for path in plan.paths))
        metrics.ROUTES.labels("vxlan").set(sum(path.way == "vxlan" for path in plan.paths))

    async def _settle_sysctls(self, uplink: str, families: set[int]) -> None:
        done, problems = await asyncio.to_thread(node.settle, uplink, self.config.mode, families)
        for sysctl in done:
            log.info("event=sysctl-set name=%s value=%s why=%r", sysctl.name, sysctl.value, sysctl.why)
        for problem in set(problems) - set(self.sysctl_problems):
            log.error("event=sysctl-problem problem=%r", str(problem))
        self.sysctl_problems = problems

    def _report_route_problems(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self.route_problems:
                log.error("event=route-problem problem=%r", problem)
        self.route_problems = problems

    # Life

    async def run(self) -> None:
        """Serve until cancelled. Raises what makes serving impossible, named for its reader."""
        server = Server(self.config.socket, calls.handlers(self.attachments, self.status), calls.observe)
        web = http.Server(self.config.http_address, self._health) if self.config.http_address else None
        try:
            await self.kernel.start()
            self._known((await self.attachments.recover()).adopted)
            await server.start()
            log.info("event=started node=%s version=%s", self.config.node_name, version("podwall"))
            await self._work()
        finally:
            await server.stop()
            await self.attachments.close()
            await self.kernel.stop()
            await self.route_kernel.close()
            await self.wiring.close()
            self._source.close()
            if web:
                web.close()
            log.info("event=stopped node=%s", self.config.node_name)

    def _known(self, adopted: Sequence[Attachment]) -> None:
        for attachment in adopted:
            owner = links.link_owner(attachment.container_id, attachment.ifname)
            self._attached[owner] = attachment
            self._rules.mark(owner)
        self._rules.mark(links.STATIC)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._source.run(self._event))
            tasks.create_task(self._reconcile_rules())
            tasks.create_task(self._routes.loop())
            tasks.create_task(self._repair_rules())
            tasks.create_task(self._repair_routes())
            tasks.create_task(self._announcing.loop())
            tasks.create_task(_every(ALIVE_S, self._sign_of_life))
            tasks.create_task(_every(REAP_S, self._reap))
            tasks.create_task(_every(RESYNC_S, self._resync))

    def _event(self, event: Event) -> None:
        """Take one event; mark what may have changed by it."""
        changed = self.store.apply(event)
        if isinstance(event, Synced):
            log.info("event=synced kind=%s", event.kind)
            if all(kind in self.store.synced for kind in KINDS):
                self._synced.set()
        if any(each.kind == "Node" for each in changed):
            self._rules.mark(links.CLUSTER)
            self._routes.mark(ROUTES)
            self._announcing.mark(NODE)
            own = self.store.snapshot.nodes.get(self.config.node_name)
            self.attachments.set_pod_cidrs(own.pod_cidrs if own else ())

    async def _reconcile_rules(self) -> None:
        """Nothing is committed, and so nothing pruned, before every kind has been listed once."""
        await self._synced.wait()
        self._rules.mark(links.CLUSTER)
        await self._rules.loop()

    async def _repair_rules(self) -> None:
        async for foreign in self.kernel.changes():
            metrics.REPAIRS.inc()
            log.warning(
                "event=foreign-change tables=%s lost=%s", sorted(map(str, foreign.tables)), foreign.lost
            )
            self.rules.distrust()
            self._rules.mark(links.STATIC)

    async def _repair_routes(self) -> None:
        async for _ in self.route_kernel.changes():
            self._routes.mark(ROUTES)

    async def _resync(self) -> None:
        self.rules.distrust()
        self._rules.mark(links.STATIC)
        self._routes.mark(ROUTES)

    async def _reap(self) -> None:
        reaped = await self.attachments.reap()
        if reaped:
            log.warning("event=reaped pods=%d", reaped)

    async def _sign_of_life(self) -> None:
        self._health.alive()
        metrics.PODS.set(len(self.attachments.current))

    async def _announce(self, _: frozenset[str]) -> None:
        """When Pods can be attached: tell the runtime, then the cluster. Raises OSError, ApiError."""
        if self.attachments.not_ready():
            return
        if await asyncio.to_thread(node.write_conflist, self.config.cni_conf_dir, self.config.socket):
            log.info("event=conflist-written directory=%s", self.config.cni_conf_dir)
        own = self.store.snapshot.nodes.get(self.config.node_name)
        if own and own.network_unavailable is not False:
            await self._source.network_available(own.name)

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
                {"node": path.node, "cidr": str(path.cidr), "way": path.way} for path in self.plan.paths
            ],
            "problems": [*map(str, self.sysctl_problems), *self.route_problems],
            "commits": self.rules.commits,
            "last_commit": self.rules.last_commit,
            "last_check": self.rules.last_check,
        }


async def _every(seconds: float, do: Callable[[], Awaitable[None]]) -> None:
    """Do it now and again; a failure is logged and waits for the next time."""
    while True:
        try:
            await do()
        except Exception as error:
            log.exception("event=periodic-failed what=%s error=%r", do.__name__, str(error))
        await asyncio.sleep(seconds)


def boot_id() -> str:
    """What tells this boot of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


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
        sys.exit(f"podwall-agent: {error}")
    logs.start(config.log_level)
    try:
        asyncio.run(_until_signalled(config))
    except* (LedgerError, NftError, OSError, RouteError, ServerError, WiringError) as errors:
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
