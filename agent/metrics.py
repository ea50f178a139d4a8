"""What the agent counts, under the names that `/metrics` shows."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

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
    buckets=(0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4, 8, 16),
)
SERVICES_PROGRAMMING_SECONDS = Histogram(
    "kubeproxy_network_programming_duration_seconds",
    "Time from a change of Pods or Services, by the EndpointSlice, to its commit, under kube-proxy's name",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300),
)
