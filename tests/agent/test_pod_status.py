"""Addresses in Pods' statuses: written when nobody has said them yet, where policies ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import cast

import pytest
from msgspec.structs import replace

from agent.cluster.errors import ApiError, Conflict, NotFound, Refused, Unreachable
from agent.cluster.model import IPAddress, NetworkPolicy, Object, Owner, Pod
from agent.cluster.store import Changed, snapshot_of
from agent.pod_status import PodStatus
from agent.pods.model import Attachment
from agent.sources import Source
from tests.agent.waiting import eventually

FOUR, SIX = ip_address("10.244.1.7"), ip_address("fd00:10:244:1::7")
POLICY = NetworkPolicy("other", "deny")
WEB = Pod("shop", "web", uid="u1", node="node1")


def attached(pod: str = "web", uid: str = "u1", ifname: str = "eth0", container: str = "c1") -> Attachment:
    return Attachment(
        container_id=container,
        ifname=ifname,
        link="podwall00000001",
        namespace="shop",
        pod=pod,
        pod_uid=uid,
        addresses=(FOUR, SIX),
        mac="02:00:00:00:00:01",
        host_mac="ee:ee:ee:ee:ee:ee",
        mtu=1500,
    )


class Cluster:
    """Objects, and what was written into Pods' statuses; each of `errors` is raised once."""

    def __init__(self, *objects: Object, errors: Iterable[ApiError] = ()) -> None:
        self.snapshot = snapshot_of(objects)
        self.written: list[tuple[str, tuple[IPAddress, ...]]] = []
        self.errors = list(errors)
        self.status = PodStatus(cast("Source", self), lambda: self.snapshot)

    async def set_pod_addresses(self, pod: Pod, addresses: Iterable[IPAddress]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.written.append((pod.name, tuple(addresses)))

    def change(self, *objects: Object) -> None:
        """The watch brings other objects."""
        before, self.snapshot = self.snapshot, snapshot_of(objects)
        pods = self.snapshot.pods
        self.status.take(Changed("Pod", key, before.pods.get(key), pods[key]) for key in pods)

    def after(self, *steps: Callable[[], None]) -> list[list[str]]:
        """Whose addresses were written after each step, when there was nothing more to do."""

        async def work() -> list[list[str]]:
            working = asyncio.create_task(self.status.reconciler.loop())
            found = []
            for step in steps:
                before = len(self.written)
                step()
                await eventually(lambda: self.status.reconciler.clean)
                found.append([name for name, _ in self.written[before:]])
            working.cancel()
            return found

        return asyncio.run(work())


def test_the_addresses_of_a_pod_that_was_attached_are_written() -> None:
    cluster = Cluster(WEB, POLICY)
    assert cluster.after(lambda: cluster.status.attached(attached())) == [["web"]]
    assert cluster.written == [("web", (FOUR, SIX))]


NOTHING: dict[str, tuple[list[Object], Attachment]] = {
    "no policy asks": ([WEB], attached()),
    "the kubelet was faster": ([replace(WEB, ips=(FOUR,)), POLICY], attached()),
    "it has ended": ([replace(WEB, phase="Failed"), POLICY], attached()),
    "it is to go": ([replace(WEB, deleting=True), POLICY], attached()),
    "another one has its name": ([replace(WEB, uid="u2"), POLICY], attached()),
    "it is gone": ([POLICY], attached()),
    "it is a second interface": ([WEB, POLICY], attached(ifname="net1")),
    "it is nobody's": ([WEB, POLICY], attached(pod="")),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_is_written_when(case: str) -> None:
    objects, attachment = NOTHING[case]
    cluster = Cluster(*objects)
    assert cluster.after(lambda: cluster.status.attached(attachment)) == [[]]


def test_a_mirror_has_another_uid() -> None:
    mirror = replace(WEB, owners=(Owner("Node", "node1", "n", True),), uid="mirror")
    cluster = Cluster(mirror, POLICY)
    assert cluster.after(lambda: cluster.status.adopt([attached()])) == [["web"]]


def test_it_follows_its_pod() -> None:
    """The watch may bring the Pod later than ADD ends; the kubelet may overwrite what it does not know."""
    cluster = Cluster(POLICY)
    assert cluster.after(
        lambda: cluster.status.attached(attached()),
        lambda: cluster.change(WEB, POLICY),
        lambda: cluster.change(replace(WEB, ips=(FOUR, SIX)), POLICY),
        lambda: cluster.change(replace(WEB, labels={"app": "web"}), POLICY),
    ) == [[], ["web"], [], ["web"]]


def test_one_that_was_detached_is_left_alone() -> None:
    cluster = Cluster(WEB, POLICY)

    def attach_after_another() -> None:
        cluster.status.attached(attached())
        cluster.status.detached(attached(container="the sandbox before"))

    def detach() -> None:
        cluster.status.detached(attached())
        cluster.change(replace(WEB, labels={"app": "web"}), POLICY)

    assert cluster.after(attach_after_another, detach) == [["web"], []]


ERRORS: dict[str, tuple[ApiError, list[str]]] = {
    "out of reach": (Unreachable("no answer"), ["web"]),
    "overloaded": (Refused("later", 429), ["web"]),
    "gone": (NotFound("no such Pod", 404), []),
    "another": (Conflict("another uid", 409), []),
    "not allowed": (Refused("forbidden", 403), []),
}


@pytest.mark.parametrize("case", ERRORS)
def test_it_is_tried_again_when_that_can_help(case: str) -> None:
    error, written = ERRORS[case]
    cluster = Cluster(WEB, POLICY, errors=[error])
    assert cluster.after(lambda: cluster.status.attached(attached())) == [written]


def test_that_it_is_not_allowed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(WEB, POLICY, errors=[Refused(name, 403) for name in ("web", "api")])
    relabelled = replace(WEB, labels={"app": "web"})
    cluster.after(lambda: cluster.status.attached(attached()), lambda: cluster.change(relabelled, POLICY))
    assert not cluster.errors
    assert len([each for each in caplog.messages if "pod-status-refused" in each]) == 1
