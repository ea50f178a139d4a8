"""Upstream's own tests, a fixed part of them on every run; docs/conformance.md has the figures of all."""

import re

import pytest

from tests.cluster import e2e
from tests.cluster.cluster import Settings

# A third of the tests of NetworkPolicy: each kind of peer, port, change and default once.
NETPOL = (
    "should support a 'default-deny-all' policy",
    "should support allow-all policy",
    "should allow egress access on one named port",
    "should allow egress access to server in CIDR block",
    "should ensure an IP overlapping both IPBlock.CIDR and IPBlock.Except is allowed",
    "should enforce policy based on NamespaceSelector with MatchExpressions using default ns label",
    "should enforce policy based on Multiple PodSelectors and NamespaceSelectors",
    "should enforce policy based on PodSelector or NamespaceSelector",
    "should enforce multiple, stacked policies with overlapping podSelectors",
    "should allow ingress access from updated namespace",
    "should deny ingress access to updated pod",
    "should enforce updated policy",
    "should stop enforcing policies after they are deleted",
    "should not mistakenly treat 'protocol: SCTP' as 'protocol: TCP'",
    "using UDP should enforce policy based on Ports",
)
# Of Services: what they promise to Pods, and how changes and broken ones behave.
SERVICES = (
    "[sig-network] Services should serve multiport endpoints from pods",
    "[sig-network] Services should be able to create a functioning NodePort service",
    "[sig-network] Services should be able to switch session affinity for NodePort service",
    "[sig-network] Services should be rejected when no endpoints exist",
    "[sig-network] Services should be updated after adding or deleting ports",
    "[sig-network] HostPort validates",
    "[sig-network] DNS should provide DNS for services",
)


@pytest.mark.parametrize(
    ("focus", "skip", "count"),
    [
        ("|".join(f"Netpol.*{re.escape(each)}" for each in NETPOL), r"using SCTP", len(NETPOL)),
        ("|".join(map(re.escape, SERVICES)), "OffByDefault", len(SERVICES)),
    ],
    ids=["policy", "services"],
)
def test_upstreams_own(
    focus: str, skip: str, count: int, real_cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests named above are run, no fewer, and none fails."""
    monkeypatch.setenv("PARALLEL", "3")
    status, ran = e2e.stream(e2e.command(focus, skip, real_cluster))
    assert (status, ran) == (0, count)
