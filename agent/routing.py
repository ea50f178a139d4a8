"""The way to the Pods of other nodes, kept as the cluster's Nodes and the kernel's uplink say.

    Nodes --+
            +--> plan --> settings of the kernel --> guard of the tunnel --> routes --> the Pods' MTU
    uplink -+

Whatever changes of these, or of the routes themselves, makes it begin anew; what is as planned stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent import metrics, node
from agent.config import Config
from agent.datapath import Datapath
from agent.reconcile import Reconciler
from agent.routes.kernel import RouteError, RouteKernel
from agent.routes.plan import Plan, Uplink, plan_routes, pod_mtu

ROUTES = "routes"  # the only key of its reconciler

log = logging.getLogger(__name__)


class Routing:
    """This node's routes. `found` is called with the uplink before they are made, `routed` after each sync.

    `plan` and `pod_mtu` (bytes, 0 before the first) are those in force; problems are sentences for people.
    """

    def __init__(
        self,
        config: Config,
        kernel: RouteKernel,
        datapath: Datapath,
        *,
        found: Callable[[Uplink], None],
        routed: Callable[[], None],
    ) -> None:
        self.plan = Plan()
        self.pod_mtu = 0
        self.problems: tuple[str, ...] = ()
        self.sysctl_problems: tuple[node.SysctlProblem, ...] = ()
        self.reconciler = Reconciler[str](ROUTES, self._sync, expected=RouteError)
        self._config = config
        self._kernel = kernel
        self._datapath = datapath
        self._found = found
        self._routed = routed
        self._there = False

    def not_ready(self) -> str:
        """Why no Pod can be reached from other nodes now; "" when it can."""
        if not self._there:
            return f"the routes are not in the kernel yet: {self.reconciler.error or 'first sync under way'}"
        return ""

    def mark(self) -> None:
        """Something that routes depend on may have changed."""
        self.reconciler.mark(ROUTES)

    async def repair(self) -> None:
        """Undo foreign changes, until cancelled."""
        async for _ in self._kernel.changes():
            self.mark()

    async def _sync(self, _: frozenset[str]) -> None:
        """Bring the routes to all Nodes into the kernel; without an own Node there is nothing to do yet."""
        config, nodes = self._config, self._datapath.store.snapshot.nodes
        own = nodes.get(config.node_name)
        if own is None:
            if "Node" in self._datapath.store.synced:
                self._datapath.no_plan()
            return
        try:
            uplink = await self._kernel.uplink(own.internal_ips)
        except RouteError:
            self._datapath.no_plan()
            raise
        plan = plan_routes(
            config.node_name,
            nodes.values(),
            uplink,
            config.mode,
            vxlan_id=config.vxlan_id,
            vxlan_port=config.vxlan_port,
        )
        await self._settle_sysctls(uplink.name, {cidr.version for cidr in own.pod_cidrs})
        self._found(uplink)
        await self._datapath.guard(plan)
        changes = await self._kernel.sync(plan)
        self.plan = plan
        self.pod_mtu = config.mtu or pod_mtu(config.mode, plan, uplink.mtu)
        self._there = True
        self._routed()
        self._report((*map(str, plan.problems), *changes.problems))
        for step in changes.done:
            log.info("event=routed step=%r", str(step))
        for way in ("direct", "vxlan"):
            metrics.ROUTES.labels(way).set(sum(path.way == way for path in plan.paths))

    async def _settle_sysctls(self, uplink: str, families: set[int]) -> None:
        done, problems = await asyncio.to_thread(
            node.settle, uplink, self._config.mode, families, self._config.sysctl_dir
        )
        for sysctl in done:
            log.info("event=sysctl-set name=%s value=%s why=%r", sysctl.name, sysctl.value, sysctl.why)
        for problem in set(problems) - set(self.sysctl_problems):
            log.error("event=sysctl-problem problem=%r", str(problem))
        self.sysctl_problems = problems

    def _report(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self.problems:
                log.error("event=route-problem problem=%r", problem)
        self.problems = problems
