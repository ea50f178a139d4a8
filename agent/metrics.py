"""What the agent counts, under the names that `/metrics` shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agent.cluster.model import Kind
from agent.pods.ipam import Use

CNI_SECONDS = Histogram(
    "podwall_cni_request_duration_seconds",
    "Time from a CNI request's arrival to its answer",
    ["command"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 20),
)
CNI_ERRORS = Counter("podwall_cni_errors_total", "CNI requests answered with an error", ["command", "code"])
PODS = Gauge("podwall_pods", "Pods attached on this node")
COMMIT_SECONDS = Histogram(
    "podwall_commit_duration_seconds",
    "Time of one nftables transaction",
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
)
COMMIT_ERRORS = Counter("podwall_commit_errors_total", "nftables transactions that the kernel refused")
REPAIRS = Counter("podwall_repairs_total", "Foreign changes to podwall's tables that were undone")
FLOWS_ENDED = Counter("podwall_flows_ended_total", "Flows ended because a policy no longer allows them")
ROUTES = Gauge("podwall_routes", "Routes to other nodes", ["mode"])
LOAD_BALANCER_POOL = Gauge(
    "podwall_load_balancer_pool_addresses",
    "Addresses of a pool, as the elected agent has it",
    ["pool", "family", "state"],
)
LOAD_BALANCER_ANNOUNCED = Gauge(
    "podwall_load_balancer_announced", "LoadBalancer addresses that this node answers for"
)
LOAD_BALANCER_TAKEN = Counter("podwall_load_balancer_taken_total", "Leases that this node took")
LOAD_BALANCER_ANSWERS = Counter(
    "podwall_load_balancer_answers_total", "ARP requests and neighbour solicitations answered", ["family"]
)
LOAD_BALANCER_RIVALS = Counter(
    "podwall_load_balancer_rivals_total", "Others on the link that claimed an address of this node"
)
SERVICES = Gauge("podwall_services", "Services of the cluster, when this node's agent serves them")
SERVICE_FLOWS_ENDED = Counter(
    "podwall_service_flows_ended_total", "UDP and SCTP flows ended because their endpoint or Service is gone"
)
SERVICES_SYNC_SECONDS = Histogram(
    "kubeproxy_sync_proxy_rules_duration_seconds",
    "Time to compile and commit changed Services and endpoints, under kube-proxy's name",
    buckets=tuple(0.001 * 2**power for power in range(15)),  # kube-proxy's, so that both can be summed
)
SERVICES_PROGRAMMING_SECONDS = Histogram(
    "kubeproxy_network_programming_duration_seconds",
    "Time from a change of Pods or Services, by the EndpointSlice, to its commit, under kube-proxy's name",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300),
)

# Of the Services' table, under kube-proxy's names where they mean what they mean there. Both families are
# committed together, so there is no label ip_family.

SERVICES_SYNCED = Gauge(
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "When the rules of Services were last as they should be, in seconds of the epoch",
)
SERVICES_QUEUED = Gauge(
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "When a change of Services or endpoints was last put before the next commit, in seconds of the epoch",
)
SERVICES_FAILURES = Counter(
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "Commits of Services that failed; the old rules are in force then, and it is tried again",
)
CHANGES: Mapping[Kind, Counter] = {
    "Service": Counter(
        "kubeproxy_sync_proxy_rules_service_changes_total", "Changed Services that were heard of"
    ),
    "EndpointSlice": Counter(
        "kubeproxy_sync_proxy_rules_endpoint_changes_total", "Changed EndpointSlices that were heard of"
    ),
}
PENDING: Mapping[Kind, Gauge] = {
    "Service": Gauge(
        "kubeproxy_sync_proxy_rules_service_changes_pending", "Changed Services that are not committed yet"
    ),
    "EndpointSlice": Gauge(
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "Changed EndpointSlices that are not committed yet",
    ),
}


class StateMetrics:
    """A collector of Prometheus for the state that the agent was in last; scraped by any thread."""

    def __init__(self) -> None:
        self.version = self.kernel = ""
        self.ready = False
        self.failing: Mapping[str, bool] = {}
        self.watches: Iterable[Mapping[str, Any]] = ()
        self.addresses: Iterable[Use] = ()
        self.commits: Mapping[str, float | None] = {}

    def collect(self) -> Iterator[Metric]:
        """What the agent is, whether its node takes Pods, and how its parts are."""
        build = GaugeMetricFamily(
            "podwall_build_info", "1; which podwall and kernel this is", labels=["version", "kernel"]
        )
        build.add_metric([self.version, self.kernel], 1)
        ready = GaugeMetricFamily("podwall_ready", "1 when nothing is in the way of Pods, else 0")
        ready.add_metric([], self.ready)
        failing = GaugeMetricFamily(
            "podwall_failing", "1 while the last attempt of this part of the agent failed", labels=["part"]
        )
        for part, fails in self.failing.items():
            failing.add_metric([part], fails)
        last = GaugeMetricFamily(
            "podwall_last_commit_timestamp_seconds",
            "When the last transaction of a part was committed, in seconds of the epoch",
            labels=["part"],
        )
        for part, when in self.commits.items():
            last.add_metric([part], when or 0.0)
        yield from (build, ready, failing, last, *self._watches(), *self._addresses())

    def _watches(self) -> Iterator[Metric]:
        silence = GaugeMetricFamily(
            "podwall_watch_silence_seconds",
            "How long the API server has said nothing of a kind; it does about once a minute",
            labels=["kind"],
        )
        failures = CounterMetricFamily(
            "podwall_watch_failures", "Lists and watches of a kind that failed", labels=["kind"]
        )
        for watch in self.watches:
            if watch["heard_s"] is not None:
                silence.add_metric([watch["kind"]], watch["heard_s"])
            failures.add_metric([watch["kind"]], watch["failures"])
        yield from (silence, failures)

    def _addresses(self) -> Iterator[Metric]:
        addresses = GaugeMetricFamily(
            "podwall_addresses", "Addresses of a Pod range by state", labels=["cidr", "state"]
        )
        for use in self.addresses:
            free = max(0, use.size - use.used - use.resting)
            for state, count in (("used", use.used), ("resting", use.resting), ("free", free)):
                addresses.add_metric([str(use.cidr), state], count)
        yield addresses


STATE = StateMetrics()
REGISTRY.register(STATE)
