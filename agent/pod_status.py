"""The addresses of this node's Pods in their statuses, before the kubelet says them there.

    ADD done, or the Pod changed --> are there policies? does its status say no address?
                                        --PATCH pods/status--> every node's policies know the Pod

The kubelet tells a Pod's addresses about a second after its first container has started. Until then a policy
on another node that admits the Pod by its labels does not know it, and would deny what it sends first. ADD
does not wait for this: a container takes longer to start than a status to be everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from agent.cluster.errors import ApiError, Conflict, NotFound
from agent.cluster.model import IPAddress, Pod
from agent.cluster.store import Changed, Snapshot
from agent.compile.members import PodKey, is_of
from agent.datapath import local_pod
from agent.pods.model import Attachment
from agent.reconcile import Reconciler

if TYPE_CHECKING:
    from agent.sources import Source

IFNAME = "eth0"
"""The interface whose addresses Kubernetes calls the Pod's."""
FOR_GOOD = (403, 422)
"""Not allowed, or not valid: to ask again changes nothing. The kubelet will say the addresses."""

MOST_AT_ONCE = 4
"""So that those whose ADD waits for an answer of the API server are not behind all of these."""

log = logging.getLogger(__name__)


class PodStatus:
    """Writes the addresses of attached Pods into statuses that say none."""

    def __init__(self, source: Source, snapshot: Callable[[], Snapshot]) -> None:
        self.reconciler = Reconciler[PodKey]("pod-status", self._run, expected=ApiError)
        self._source = source
        self._snapshot = snapshot
        self._attached: dict[PodKey, Attachment] = {}
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)
        self._refused: set[int] = set()  # what was logged

    def attached(self, attachment: Attachment) -> None:
        """A Pod is on the network now."""
        if attachment.pod and attachment.ifname == IFNAME:
            key = attachment.namespace, attachment.pod
            self._attached[key] = attachment
            self.reconciler.mark(key)

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """These Pods are on the node already."""
        for attachment in attachments:
            self.attached(attachment)

    def detached(self, attachment: Attachment) -> None:
        """It is no longer; another of the same name may be by now."""
        key = attachment.namespace, attachment.pod
        if key in self._attached and self._attached[key].key == attachment.key:
            del self._attached[key]

    def take(self, changed: Iterable[Changed]) -> None:
        """What an event of the cluster changed."""
        keys = [each.key for each in changed if each.kind == "Pod" and each.key in self._attached]
        if keys:
            self.reconciler.mark(*keys)

    async def _run(self, keys: frozenset[PodKey]) -> None:
        """Raises ApiError."""
        snapshot = self._snapshot()
        if not snapshot.policies:
            return
        pods = ((snapshot.pods.get(key), self._attached.get(key)) for key in keys)
        writing = [self._write(pod, of.addresses) for pod, of in pods if pod and of and _lacks(pod, of)]
        for error in filter(None, await asyncio.gather(*writing)):
            raise error

    async def _write(self, pod: Pod, addresses: Iterable[IPAddress]) -> ApiError | None:
        try:
            async with self._turns:
                await self._source.set_pod_addresses(pod, addresses)
        except (NotFound, Conflict):
            pass  # it is gone, or another one has its name
        except ApiError as error:
            if error.status not in FOR_GOOD:
                return error
            if error.status not in self._refused:
                self._refused.add(error.status)
                log.warning("event=pod-status-refused error=%r", str(error))
        return None


def _lacks(pod: Pod, attachment: Attachment) -> bool:
    """Whether its status should say these addresses and says none."""
    return not (pod.ips or pod.finished or pod.deleting) and is_of(local_pod(attachment), pod)
