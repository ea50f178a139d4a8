"""Leases and statuses of LoadBalancer Services on a real API server."""

from __future__ import annotations

import asyncio
import signal
import time
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest

from agent.cluster.errors import Conflict, NotFound
from agent.cluster.model import Lease, LoadBalancerIngress, Service
from agent.loadbalancer.candidate import Candidate
from agent.loadbalancer.claim import Timing
from agent.loadbalancer.leases import NAMESPACE, ApiLeases
from agent.sources import ApiServer
from lab.limits import SLOWNESS

PATH = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/it"


@pytest.fixture
def leases(cluster: Any) -> Any:
    client = cluster.client()
    made = ApiLeases(client)
    yield made
    made.close()
    client.close()
    cluster.a.call("DELETE", PATH)


async def until(condition: Any, limit_s: float = 20.0 * SLOWNESS) -> float:
    """How many seconds it took until something held."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


def test_the_server_refuses_what_is_not_based_on_the_lease_as_it_is(cluster: Any, leases: ApiLeases) -> None:
    async def story() -> None:
        assert await leases.get("it") is None
        made = await leases.create(Lease(NAMESPACE, "it", holder="a", duration_s=3))
        with pytest.raises(Conflict):
            await leases.create(Lease(NAMESPACE, "it", holder="b"))
        # A write that changes nothing would leave the version as it is; renewing changes the time.
        renewed = await leases.update(msgspec.structs.replace(made, renewed=datetime.now(UTC)))
        ours = f"{PATH.rpartition('/')[0]}?labelSelector=app.kubernetes.io/name=podwall"
        assert [each["metadata"]["name"] for each in cluster.a.call("GET", ours)[1]["items"]] == ["it"]
        for write in (leases.update, leases.delete):
            with pytest.raises(Conflict):
                await write(made)
        await leases.delete(renewed)
        with pytest.raises((Conflict, NotFound)):
            await leases.update(renewed)
        assert await leases.get("it") is None

    asyncio.run(story())


def test_two_nodes_and_one_lease(cluster: Any, leases: ApiLeases) -> None:
    """One dies, the other takes over in time; then nobody can reach the server, and nobody holds it."""

    async def story() -> None:
        nodes = [Candidate("it", name, leases, Timing(), changed=lambda: None) for name in ("a", "b")]
        tasks = [asyncio.create_task(node.run()) for node in nodes]
        for rank, node in enumerate(nodes):
            node.want(rank)
        await until(lambda: nodes[0].held)
        await until(lambda: nodes[1].holder == "a")
        tasks[0].cancel()
        seconds = await until(lambda: nodes[1].held)
        print(f"taken over on a real API server after {seconds:.2f} s")
        assert not nodes[0].held
        assert 2.0 < seconds < 5.0 * SLOWNESS
        for server in (cluster.a, cluster.b):
            server.send(signal.SIGSTOP)
        try:
            stopped = await until(lambda: not nodes[1].held)
            assert stopped < 3.0
        finally:
            for server in (cluster.a, cluster.b):
                server.send(signal.SIGCONT)
        await until(lambda: nodes[1].held)
        await nodes[1].resign(5.0)
        lease = await leases.get("it")
        assert lease is not None
        assert lease.holder == ""
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(story())


def test_addresses_in_a_status(cluster: Any) -> None:
    ports = [{"port": 80, "protocol": "TCP"}]
    body = {"metadata": {"name": "web"}, "spec": {"type": "LoadBalancer", "ports": ports}}
    cluster.a.create("/api/v1/namespaces/default/services", body)
    client = cluster.client()
    source = ApiServer(client, ("Service",))

    def balanced() -> Service:
        service = client.get("Service", ("default", "web"))
        assert isinstance(service, Service)
        return service

    async def story() -> None:
        both = (ip_address("192.0.2.7"), ip_address("2001:db8::7"))
        for addresses in (both, both[:1], both[1:], ()):
            await source.set_load_balancer(balanced(), addresses)
            assert balanced().load_balancer == tuple(map(LoadBalancerIngress, addresses))
        with pytest.raises(NotFound):
            await source.set_load_balancer(Service("default", "gone"), ())

    try:
        asyncio.run(story())
    finally:
        source.close()
        cluster.a.call("DELETE", "/api/v1/namespaces/default/services/web")
