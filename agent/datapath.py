"""The Pods' rules in nftables: from cluster objects and attached Pods to commits, and to flows that must end.

    store --changed--> policy compiler --+
    nodes, plan -----------------------> |owners| --> reconciler --> Rules --> one transaction
    attached Pods --> links, compiler ---+                              |
                                                                        +--> flows that are denied now end

ADD waits for one transaction that holds all of its Pod: its addresses, its isolation and its allows. Before
it, the Pod's labels and the policies of its namespace must be known. The cluster is asked: for the Pod when
the watch has not brought it yet, and whether the watches have brought every policy that there is by now.
Without an answer ADD fails, closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from agent import flows, metrics
from agent.cluster.model import Event, IPAddress, Kind, Node, Pod, Synced, Upsert
from agent.cluster.store import Changed, Store
from agent.compile import audit, links, tunnel, verdicts
from agent.compile.incremental import PolicyCompiler
from agent.compile.members import LocalPod, PodKey, is_of
from agent.compile.names import ARP_TABLE, TABLE
from agent.config import Config
from agent.conntrack import ConntrackError, Flow, end_denied
from agent.denials import Denial, Denials, Reason
from agent.nft.evaluate import Evaluator
from agent.nft.kernel import Kernel, NftError
from agent.nft.model import Item, Owner
from agent.pods.model import Attachment
from agent.policy_status import METRICS, PolicyKey, PolicyState, PolicyStatus
from agent.reconcile import Reconciler
from agent.reports import Reports
from agent.routes.kernel import RouteError
from agent.routes.plan import Plan
from agent.rules import Rules

KINDS: tuple[Kind, ...] = ("Node", "Namespace", "Pod", "NetworkPolicy")
"""What the rules are made of."""

TABLES = frozenset({TABLE, ARP_TABLE})
"""What its transactions speak of. Services have a table and transactions of their own (`agent.services`)."""

POLICY_OWNERS = frozenset({"class", "isolated", "peer", "member"})
FLOWS = "flows"  # the only key of its reconciler
PLAN_LIMIT_S = 5.0  # how long the first commit waits for the way to other nodes
ANSWERS_EVERY_S = 0.25  # how often late answers to ended flows are looked for, while there may be some

Reach = Callable[[str], Awaitable[None]]
FindPod = Callable[[str, str], Awaitable[Pod | None]]
LocalAddresses = Callable[[], Awaitable[frozenset[IPAddress]]]

log = logging.getLogger(__name__)


class UnknownPodError(Exception):
    """The cluster has no such Pod, so nobody knows its labels."""


class Datapath:
    """What attachments ask for (`attached`, `detached`), and what keeps the rules as the cluster says.

    `reach` returns when the store has every policy that a namespace has by now; `find_pod` asks the cluster
    for a Pod that the store does not have yet, None when there is none;
    `local_addresses` are the node's own; `reports` hears what is wrong in objects. `committed`
    is called after each successful commit.
    """

    def __init__(
        self,
        config: Config,
        *,
        reach: Reach,
        find_pod: FindPod,
        local_addresses: LocalAddresses,
        reports: Reports,
        committed: Callable[[], None],
    ) -> None:
        self.store = Store()
        self.kernel = Kernel()
        self.rules = Rules(self.kernel, self._compile, TABLES)
        self.policies = PolicyCompiler(config.node_name)
        self.reconciler = Reconciler[Owner]("rules", self._run, expected=NftError)
        self.ended_flows = Reconciler[str](FLOWS, self._end_flows, expected=(ConntrackError, RouteError))
        self._config = config
        self._reach = reach
        self._find_pod = find_pod
        self._local_addresses = local_addresses
        self._reports = reports
        self._committed = committed
        self._plan: Plan | None = None
        self._planned = asyncio.Event()
        self._synced = asyncio.Event()
        self._answers = flows.Answers()
        self._attached: dict[Owner, Attachment] = {}
        self._status = PolicyStatus(time.time)
        self._shown: float | None = None
        self.denials = Denials(verdicts.LOG_GROUP, self._describe)

    # What attachments ask

    async def attached(self, attachment: Attachment) -> None:
        """Return when the Pod's rules are in force. Raises UnknownPodError, ApiError."""
        if attachment.pod:
            await asyncio.gather(self._reach(attachment.namespace), self._know(attachment))
        await self.reconciler.settle(*self._attach(attachment))

    async def detached(self, attachment: Attachment) -> None:
        """Return when no rule speaks of the Pod any more.

        Before the cluster has been listed nothing is committed, and no Pod added that could get the address:
        the first commit leaves this one out.
        """
        owner = links.link_owner(attachment.container_id, attachment.ifname)
        self._attached.pop(owner, None)
        owners = self.policies.detach(attachment.container_id, attachment.ifname)
        self.denials.forget(attachment.namespace, attachment.pod)
        if self._synced.is_set():
            await self.reconciler.settle(owner, *owners)

    def not_ready(self) -> str:
        """Why no Pod can have its rules now; "" when it can."""
        missing = [kind for kind in KINDS if kind not in self.store.synced]
        if missing:
            return f"waiting for the first list of {', '.join(missing)} from {self._config.cluster}"
        if self.rules.last_check is None:
            return f"the rules are not in the kernel yet: {self.reconciler.error or 'first commit under way'}"
        return ""

    # What the agent tells

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """These Pods are on the node already; they are part of the first commit."""
        for attachment in attachments:
            self.reconciler.mark(*self._attach(attachment))
        self.reconciler.mark(links.STATIC, verdicts.STATIC)

    def take(self, event: Event) -> tuple[Changed, ...]:
        """Take one event of the cluster; return what it changed."""
        changed = self.store.apply(event)
        if isinstance(event, Synced):
            log.info("event=synced kind=%s", event.kind)
            if all(kind in self.store.synced for kind in KINDS):
                self._synced.set()
        if changed:
            self._report(changed)
            self._status.saw(changed)
            self.reconciler.mark(*self.policies.apply(changed))
        if any(each.kind == "Node" for each in changed):
            self.reconciler.mark(links.CLUSTER, tunnel.TUNNEL)
        return changed

    def _report(self, changed: Iterable[Changed]) -> None:
        """Tell what cannot be used in these objects, and forget what was wrong in those that are gone."""
        for each in changed:
            problems = tuple(map(str, each.after.problems)) if each.after else ()
            uid = each.after.uid if each.after else ""
            self._reports.set(each.kind, each.key, uid, "fields", problems)

    async def guard(self, plan: Plan) -> None:
        """Return when the tunnel of this plan may be made or used: nobody else can speak into it."""
        changed, self._plan = plan != self._plan, plan
        self._planned.set()
        if changed and plan.vxlan:
            await self.reconciler.settle(tunnel.TUNNEL)
        elif changed:
            self.reconciler.mark(tunnel.TUNNEL)

    def no_plan(self) -> None:
        """Say that there is no plan for now, and that nobody shall wait for one."""
        self._planned.set()

    def resync(self) -> None:
        """Compare the kernel with what it should hold, as a whole."""
        self.rules.distrust()
        self.reconciler.mark(links.STATIC)

    async def reconcile(self) -> None:
        """Work until cancelled. Nothing is committed, nor pruned, before every kind has been listed.

        Nor before it is known whether there is a tunnel: its rules would be gone for a moment. When that
        cannot be said (no uplink, no Node), policies go first, and the tunnel's port stays guarded.
        """
        await self._synced.wait()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._planned.wait(), PLAN_LIMIT_S)
        self.reconciler.mark(links.CLUSTER)
        await self.reconciler.loop()

    # Pods

    async def _know(self, attachment: Attachment) -> None:
        """Have the Pod in the store, by asking the cluster when need be. Raises UnknownPodError, ApiError."""
        local = local_pod(attachment)
        known = self.store.snapshot.pods.get(local.key)
        if known is not None and is_of(local, known):
            return
        pod = await self._find_pod(*local.key)
        if pod is None or not is_of(local, pod):
            raise UnknownPodError(
                f"the cluster has no Pod {attachment} with uid {attachment.pod_uid or '(not given)'}, "
                "so its policies are not known"
            )
        self.take(Upsert("Pod", pod))

    def _attach(self, attachment: Attachment) -> frozenset[Owner]:
        owner = links.link_owner(attachment.container_id, attachment.ifname)
        self._attached[owner] = attachment
        return self.policies.attach(local_pod(attachment)) | {owner}

    # Rules

    def _compile(self, owner: Owner) -> Iterable[Item]:
        """The items of one owner, from what is known now; nothing when it is gone."""
        if owner == links.STATIC:
            return links.static(self._config.masquerade)
        if owner == links.CLUSTER:
            return links.cluster(self._nodes())
        if owner == tunnel.TUNNEL:
            return self._tunnel()
        if owner in self._attached:
            attached = self._attached[owner]
            return links.link(attached.link, attached.addresses, attached.namespace, attached.pod)
        return self.policies.items(owner)

    def _tunnel(self) -> Iterable[Item]:
        config, nodes = self._config, self._nodes()
        if self._plan is None:
            return tunnel.guard(config.node_name, nodes, config.vxlan_port)
        return tunnel.items(config.node_name, nodes, self._plan, config.masquerade)

    def _nodes(self) -> Iterable[Node]:
        return self.store.snapshot.nodes.values()

    async def _run(self, owners: frozenset[Owner]) -> None:
        self._status.begin()
        await self.rules.run(owners)
        self._status.done()
        if any(owner[0] in POLICY_OWNERS for owner in owners):
            self.ended_flows.mark(FLOWS)
        self._committed()

    # What is asked

    def policy_states(self) -> tuple[PolicyState, ...]:
        """The policies that select Pods of this node: which generation is in force, and since when."""
        return self._status.of(self.policies.selected())

    def policy_state(self, key: PolicyKey, pods: int) -> PolicyState | None:
        """One policy's state, which selects so many Pods here; None while nothing is known of it."""
        return next(iter(self._status.of({key: pods})), None)

    def show_policies(self) -> None:
        """Bring the metrics up to date, if there were commits since."""
        if self._shown != self.rules.last_check:
            self._shown = self.rules.last_check
            METRICS.states = self.policy_states()

    def addresses(self) -> dict[IPAddress, str]:
        """Those of this node's Pods, and whose they are, as namespace/name."""
        return {
            address: f"{each.namespace}/{each.pod}"
            for each in self._attached.values()
            for address in each.addresses
        }

    def pod_addresses(self) -> frozenset[IPAddress]:
        """Those of the cluster's Pods that have some of their own."""
        pods = self.store.snapshot.pods.values()
        return frozenset(address for pod in pods if not pod.host_network for address in pod.ips)

    def links(self) -> dict[IPAddress, str]:
        """The host ends of this node's Pods' links, by the Pods' addresses."""
        return {address: each.link for each in self._attached.values() for address in each.addresses}

    async def local_addresses(self) -> frozenset[IPAddress]:
        """The node's own. Raises RouteError."""
        return await self._local_addresses()

    def named(self, address: IPAddress) -> str:
        """The Pods of the cluster whose own address this is, as namespace/name; "" for none."""
        pods = self.store.snapshot.pods_at(address).items()
        return _named(key for key, pod in pods if not pod.host_network and not pod.finished)

    # What was denied

    def _describe(self, denial: Denial) -> Reason:
        """Name the Pods of a denied packet; its log prefix says which rules denied it."""
        words = denial.prefix.split()[1:]
        audited = words[:1] == [audit.WORD]
        direction, pod_class = ([*words[audited:], "", ""])[:2]
        ends = (denial.source, denial.destination)
        mine, theirs = ends if direction == "egress" else reversed(ends)
        pods = self.store.snapshot.pods_at
        own = [pod.key for pod in self.policies.members(pod_class) if mine in pod.addresses]
        return Reason(
            pod=_named(own or pods(mine)),
            peer=_named(pods(theirs)),
            direction=direction,
            pod_class=pod_class,
            policies=tuple("/".join(key) for key in self.policies.policies_of(pod_class)),
            audit=audited,
        )

    # Flows

    async def _end_flows(self, _: frozenset[str]) -> None:
        """End the flows of isolated Pods that the rules in force do not allow. Raises ConntrackError."""
        isolated = flows.isolated(self.rules.ruleset)
        if not isolated:
            return
        ended = await end_denied(self._judge, isolated)
        if self._answers.awaited():
            asyncio.get_running_loop().call_later(ANSWERS_EVERY_S, self.ended_flows.mark, FLOWS)
        if ended.ended:
            metrics.FLOWS_ENDED.inc(ended.ended)
            log.info("event=flows-ended ended=%d gone=%d", ended.ended, ended.gone)

    async def _judge(self) -> Callable[[Flow], bool]:
        """Whether a flow is allowed by the rules in force now."""
        local = await self._local_addresses()
        judge = flows.Judge(Evaluator(self.rules.ruleset, flows.to_one), self.links(), local)
        return self._answers.judge(judge.allowed)


def _named(pods: Iterable[PodKey]) -> str:
    return ",".join(sorted("/".join(key) for key in pods))


def local_pod(attachment: Attachment) -> LocalPod:
    """The Pod behind an attachment."""
    return LocalPod(
        container_id=attachment.container_id,
        ifname=attachment.ifname,
        namespace=attachment.namespace,
        name=attachment.pod,
        addresses=attachment.addresses,
        uid=attachment.pod_uid,
    )
