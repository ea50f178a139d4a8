"""The elected agent's work: the status of each Service of podwall's class says what `allocation` gives it.

    Services, pools --allocate--> what statuses shall say --differs--> PATCH services/status
                              \\-> problems --> reports, Kubernetes Events

Who has written knows it before the watch tells: until it does, what was written stands for the status, so
that a second run in between gives nothing away twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping

import msgspec

from agent import metrics
from agent.cluster.errors import ApiError, NotFound
from agent.cluster.model import IPAddress, LoadBalancerIngress, Service
from agent.loadbalancer.allocation import Allocation, Name, allocate
from agent.loadbalancer.pools import Pool
from agent.reports import Reports
from agent.sources import Source

TOPIC = "pool"

log = logging.getLogger(__name__)


class Allocator:
    """Writes statuses for as long as `held` says that this agent is the elected one."""

    def __init__(
        self, pools: tuple[Pool, ...], source: Source, reports: Reports, held: Callable[[], bool]
    ) -> None:
        self._pools = pools
        self._source = source
        self._reports = reports
        self._held = held
        self._written: dict[Name, tuple[Service, Service]] = {}  # as it was, and as it was written
        self._reported: dict[Name, str] = {}

    async def sync(self, services: Iterable[Service], taken: Container[IPAddress] = ()) -> None:
        """Bring all statuses up to date; `taken` addresses are Nodes'.

        Raises the first ApiError, after having tried the others.
        """
        current = {each.key: self._as_written(each) for each in services}
        self._written = {key: pair for key, pair in self._written.items() if current.get(key) is pair[1]}
        if not self._held():
            self._step_down()
            return
        allocation = allocate(self._pools, current.values(), taken)
        self._report(allocation, current)
        self._count(allocation)
        errors = [
            await self._write(current[key], new) for key, new in _changes(current, allocation.addresses)
        ]
        for error in filter(None, errors):
            raise error

    def _as_written(self, service: Service) -> Service:
        before, after = self._written.get(service.key, (service, service))
        return after if before is service else service

    async def _write(self, service: Service, addresses: tuple[IPAddress, ...]) -> ApiError | None:
        if not self._held():
            return None
        name = "/".join(service.key)
        try:
            await self._source.set_load_balancer(service, addresses)
        except NotFound:
            return None
        except ApiError as error:
            log.warning("event=status-failed service=%s error=%r", name, str(error))
            return error
        log.info("event=status-written service=%s addresses=%s", name, ",".join(map(str, addresses)))
        status = tuple(LoadBalancerIngress(ip) for ip in addresses)
        before = self._written.get(service.key, (service, service))[0]
        self._written[service.key] = before, msgspec.structs.replace(service, load_balancer=status)
        return None

    def _report(self, allocation: Allocation, current: Mapping[Name, Service]) -> None:
        for key in self._reported.keys() - allocation.problems.keys():
            self._reports.set("Service", key, self._reported.pop(key), TOPIC, ())
        for key, problems in allocation.problems.items():
            self._reported[key] = current[key].uid
            self._reports.set("Service", key, current[key].uid, TOPIC, problems)

    def _count(self, allocation: Allocation) -> None:
        for pool in self._pools:
            for family in {each.family for each in pool.ranges}:
                used = allocation.used(pool, family)
                labels = (pool.name, f"IPv{family}")
                metrics.LOAD_BALANCER_POOL.labels(*labels, "used").set(used)
                metrics.LOAD_BALANCER_POOL.labels(*labels, "size").set(pool.size(family))

    def _step_down(self) -> None:
        """Another agent tells what is wrong now."""
        for key, uid in self._reported.items():
            self._reports.set("Service", key, uid, TOPIC, ())
        self._reported.clear()
        self._written.clear()
        metrics.LOAD_BALANCER_POOL.clear()


def _changes(
    services: Mapping[Name, Service], wanted: Mapping[Name, tuple[IPAddress, ...]]
) -> list[tuple[Name, tuple[IPAddress, ...]]]:
    """The statuses to write; those that lose an address first, for another may get it."""
    found = []
    for key, addresses in wanted.items():
        status = tuple(LoadBalancerIngress(ip) for ip in addresses)
        if services[key].load_balancer != status:
            loses = {each.ip for each in services[key].load_balancer} - set(addresses)
            found.append((not loses, key, addresses))
    return [(key, addresses) for _, key, addresses in sorted(found)]
