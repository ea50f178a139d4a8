"""What `/metrics` says: kube-proxy's names mean what they mean there, and the agent's state is shown."""

from __future__ import annotations

from ipaddress import ip_network

from prometheus_client import REGISTRY

from agent import metrics
from agent.cluster.model import Remove
from agent.pods.ipam import Use
from tests.agent.test_services import NODE, WEB, World, endpoints, namespace, story, until

__all__ = ["namespace"]  # the fixture, which every test here has by itself

SYNC = "kubeproxy_sync_proxy_rules"


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, labels)
    assert found is not None, f"there is no {name} {labels}"
    return float(found)


def pending() -> tuple[float, float]:
    return value(f"{SYNC}_service_changes_pending"), value(f"{SYNC}_endpoint_changes_pending")


def totals() -> tuple[float, float]:
    return value(f"{SYNC}_service_changes_total"), value(f"{SYNC}_endpoint_changes_total")


def test_changes_of_services_and_endpoints_are_counted_apart() -> None:
    async def body(world: World) -> None:
        world.upsert(NODE)
        world.synced()
        async with world.running():
            await world.settled()
            before = totals()
            world.upsert(WEB, endpoints("10.244.1.7"))
            await world.settled()
            world.upsert(endpoints("10.244.1.7"))  # the same again is no change
            world.upsert(endpoints("10.244.1.8"))
            world.give(Remove("Service", WEB.key))
            await world.settled()
            assert tuple(now - then for now, then in zip(totals(), before, strict=True)) == (2, 2)
            assert pending() == (0, 0)

    story(body)


def test_what_cannot_be_committed_stays_pending_and_shows_by_its_times() -> None:
    async def body(world: World) -> None:
        world.upsert(NODE, WEB, endpoints("10.244.1.7"))
        world.synced()

        def late() -> bool:
            return value(f"{SYNC}_last_queued_timestamp_seconds") > value(f"{SYNC}_last_timestamp_seconds")

        async with world.running():
            await world.settled()
            failures = value(f"{SYNC}_nftables_sync_failures_total")
            assert pending() == (0, 0)
            with world.refusing():
                world.upsert(endpoints("10.244.1.8"))
                await until(lambda: world.services.reconciler.error is not None)
                world.upsert(endpoints("10.244.1.9"))
                assert (pending(), late()) == ((0, 2), True)
                assert value(f"{SYNC}_nftables_sync_failures_total") > failures
            await until(lambda: world.services.reconciler.error is None and world.services.reconciler.clean)
            assert (pending(), late()) == ((0, 0), False)

    story(body)


def test_the_state_of_the_agent_is_shown() -> None:
    state = metrics.StateMetrics()
    state.version, state.kernel, state.ready = "0.1.0", "6.1.0", True
    state.failing = {"rules": False, "routes": True}
    state.watches = [
        {"kind": "Pod", "heard_s": 3.5, "failures": 2},
        {"kind": "Node", "heard_s": None, "failures": 0},
    ]
    state.addresses = [Use(ip_network("10.244.1.0/29"), used=4, resting=1, size=6)]
    state.commits = {"pods": 100.0, "services": None}
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in state.collect()
        for sample in family.samples
    }
    assert found == {
        ("podwall_build_info", "0.1.0", "6.1.0"): 1,
        ("podwall_ready",): 1,
        ("podwall_failing", "rules"): 0,
        ("podwall_failing", "routes"): 1,
        ("podwall_last_commit_timestamp_seconds", "pods"): 100.0,
        ("podwall_last_commit_timestamp_seconds", "services"): 0.0,
        ("podwall_watch_silence_seconds", "Pod"): 3.5,
        ("podwall_watch_failures_total", "Pod"): 2,
        ("podwall_watch_failures_total", "Node"): 0,
        ("podwall_addresses", "10.244.1.0/29", "used"): 4,
        ("podwall_addresses", "10.244.1.0/29", "resting"): 1,
        ("podwall_addresses", "10.244.1.0/29", "free"): 1,
    }
