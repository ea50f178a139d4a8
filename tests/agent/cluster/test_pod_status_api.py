"""Addresses in a Pod's status on a real API server, which keeps all else that the status says."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from typing import Any

import pytest
from msgspec.structs import replace

from agent.cluster.errors import Conflict, NotFound, Refused
from agent.cluster.model import Pod
from agent.sources import ApiServer

PODS = "/api/v1/namespaces/default/pods"
FOUR, SIX, OTHER = map(ip_address, ("10.244.1.7", "fd00:10:244:1::7", "10.244.1.8"))


def test_addresses_in_a_status(cluster: Any) -> None:
    spec = {"containers": [{"name": "main", "image": "none"}], "automountServiceAccountToken": False}
    cluster.a.create(PODS, {"metadata": {"name": "starting"}, "spec": spec})
    client = cluster.client()
    source = ApiServer(client, ("Pod",))

    def there() -> Pod:
        pod = client.get("Pod", ("default", "starting"))
        assert isinstance(pod, Pod)
        return pod

    async def story() -> None:
        pod = there()
        assert pod.ips == ()
        for addresses in ((FOUR, SIX), (OTHER,), (FOUR, SIX)):
            await source.set_pod_addresses(pod, addresses)
            assert there() == replace(pod, ips=addresses)
        with pytest.raises((Conflict, Refused)):
            await source.set_pod_addresses(replace(pod, uid="another"), (OTHER,))
        with pytest.raises(NotFound):
            await source.set_pod_addresses(Pod("default", "gone", uid=pod.uid), (OTHER,))
        assert there().ips == (FOUR, SIX)

    try:
        asyncio.run(story())
    finally:
        source.close()
        cluster.a.call("DELETE", f"{PODS}/starting?gracePeriodSeconds=0")
