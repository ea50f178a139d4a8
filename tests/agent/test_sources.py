"""Where objects come from: a Pod is found with everything that was written before it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.cluster.model import Event, Upsert
from agent.sources import Manifests

POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}}
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop}
spec: {containers: []}
"""
LIMIT_S = 10.0


def test_a_pod_is_found_after_the_policies_that_were_written_before_it(tmp_path: Path) -> None:
    async def story() -> list[str]:
        delivered: list[Event] = []
        synced = asyncio.Event()

        def deliver(event: Event) -> None:
            delivered.append(event)
            synced.set()

        source = Manifests(tmp_path)
        running = asyncio.create_task(source.run(deliver))
        async with asyncio.timeout(LIMIT_S):
            await synced.wait()
            (tmp_path / "policy.yaml").write_text(POLICY)
            (tmp_path / "pod.yaml").write_text(POD)
            assert await source.find_pod("shop", "api")
        running.cancel()
        return [event.kind for event in delivered if isinstance(event, Upsert)]

    assert {"Pod", "NetworkPolicy"} <= set(asyncio.run(story()))


def test_a_pod_that_nobody_wrote_is_not_found(tmp_path: Path) -> None:
    assert asyncio.run(Manifests(tmp_path).find_pod("shop", "api")) is None
