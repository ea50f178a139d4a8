"""Kubernetes objects as podwall sees them: frozen values, checked once when they are decoded.

Only what decides about a packet is kept.  Addresses and ranges are `ipaddress` objects, ports are numbers in
range, and what could not be used is left out and named in the object's `problems`; an allow that could not be
used stays in its place as a `Problem`, so that leaving it out never widens a rule:

    ingress:                         NetworkPolicy.ingress = (
    - from:                              PolicyRule(peers=(
      - ipBlock: {cidr: 10.0.0.041/8}        Problem("spec.ingress[0].from[0].ipBlock.cidr", ...),
      - podSelector: {}                      SelectorPeer(pod_selector=LabelSelector()),
      ports: []                          ), ports=()),)

Names, labels and annotations are as hostile as whoever may create objects: they are compared and shown, never
trusted as syntax.  Defaults are those that the API server fills in, so objects of a manifest and of the API
are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, TypeAlias, cast

from msgspec import Struct

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network
Family: TypeAlias = Literal[4, 6]
Labels: TypeAlias = Mapping[str, str]
Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
Direction: TypeAlias = Literal["Ingress", "Egress"]
PolicyMode: TypeAlias = Literal["enforce", "audit"]
Operator: TypeAlias = Literal["In", "NotIn", "Exists", "DoesNotExist"]
Phase: TypeAlias = Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"]
TrafficPolicy: TypeAlias = Literal["Cluster", "Local"]
ServiceType: TypeAlias = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]

PROTOCOLS: tuple[Protocol, ...] = ("TCP", "UDP", "SCTP")
BOTH_DIRECTIONS: frozenset[Direction] = frozenset(("Ingress", "Egress"))
MODE_ANNOTATION = "podwall.dev/mode"
POLICY_MODES: tuple[PolicyMode, ...] = ("enforce", "audit")
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"
CLIENT_IP_TIMEOUT = 10800


class Problem(Struct, frozen=True, gc=False):
    """What cannot be used in an object: the field's path as kubectl writes it, and what is allowed there."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class Node(Struct, frozen=True, gc=False):
    """A node: the ranges its Pods have their addresses from, and its own addresses, in its status's order."""

    name: str
    uid: str = ""
    labels: Labels = {}
    pod_cidrs: tuple[IPNetwork, ...] = ()
    internal_ips: tuple[IPAddress, ...] = ()
    external_ips: tuple[IPAddress, ...] = ()
    ready: bool = False
    deleting: bool = False
    annotations: Labels = {}
    network_unavailable: bool | None = None  # the condition NetworkUnavailable; None: nobody has set it
    unschedulable: bool = False  # cordoned
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> str:
        return self.name


class Namespace(Struct, frozen=True, gc=False):
    """A namespace; its label kubernetes.io/metadata.name is always present."""

    name: str
    uid: str = ""
    labels: Labels = {}
    deleting: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> str:
        return self.name


class ContainerPort(Struct, frozen=True, gc=False):
    """A port that a container declares; `host_port` 0 means none, `host_ip` None any address of the node."""

    name: str
    port: int
    protocol: Protocol = "TCP"
    host_port: int = 0
    host_ip: IPAddress | None = None
    role: Literal["container", "sidecar", "init"] = "container"


class Owner(Struct, frozen=True, gc=False):
    """The object that made this one (metadata.ownerReferences)."""

    kind: str
    name: str
    uid: str = ""
    controller: bool = False


class Pod(Struct, frozen=True, gc=False):
    """A Pod; `ips` is empty until its status says them.

    `ports` has those of containers before those of sidecars before those of other init containers.
    """

    namespace: str
    name: str
    uid: str = ""
    labels: Labels = {}
    node: str = ""
    phase: Phase = "Pending"
    host_network: bool = False
    ips: tuple[IPAddress, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    ready: bool = False
    deleting: bool = False
    owners: tuple[Owner, ...] = ()
    hostname: str = ""
    subdomain: str = ""
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name

    @property
    def finished(self) -> bool:
        """Its containers have ended for good, so its addresses may belong to another Pod already."""
        return self.phase in {"Succeeded", "Failed"}


class Requirement(Struct, frozen=True, gc=False):
    """One expression of a label selector; `values` is empty for Exists and DoesNotExist."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()


class LabelSelector(Struct, frozen=True, gc=False):
    """All of its requirements must hold; the empty selector selects everything.

    Sorted and without repetitions, so that equal selectors are equal values and may be the key of a set.
    """

    match_labels: tuple[tuple[str, str], ...] = ()
    match_expressions: tuple[Requirement, ...] = ()


EVERYTHING = LabelSelector()


class IPBlock(Struct, frozen=True, gc=False):
    """A range of addresses without some parts of it (`excepts`, each inside `cidr` and smaller than it)."""

    cidr: IPNetwork
    excepts: tuple[IPNetwork, ...] = ()


class SelectorPeer(Struct, frozen=True, gc=False):
    """Pods by labels; None is a missing selector.

    Without `namespace_selector`: of the policy's own namespace.  Without `pod_selector`: all Pods of those
    namespaces.
    """

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None


class PolicyPort(Struct, frozen=True, gc=False):
    """Port None means every port of the protocol; a name is looked up at the Pod that receives.

    `end_port` is the last port of a range, included.
    """

    protocol: Protocol = "TCP"
    port: int | str | None = None
    end_port: int | None = None


PolicyPeer: TypeAlias = IPBlock | SelectorPeer


class PolicyRule(Struct, frozen=True, gc=False):
    """One allow rule: any of the peers on any of the ports.

    None is a missing list and `()` an empty one; both match everything.  A `Problem` among the members
    matches nothing.
    """

    peers: tuple[PolicyPeer | Problem, ...] | None = None
    ports: tuple[PolicyPort | Problem, ...] | None = None


class NetworkPolicy(Struct, frozen=True, gc=False):
    """A policy; `policy_types` has the defaults filled in.

    When its podSelector cannot be used, `pod_selector` holds the requirements that can be (so it selects
    more, never less) and there are no rules.
    """

    namespace: str
    name: str
    uid: str = ""
    pod_selector: LabelSelector = EVERYTHING
    policy_types: frozenset[Direction] = frozenset(("Ingress",))
    ingress: tuple[PolicyRule, ...] = ()
    egress: tuple[PolicyRule, ...] = ()
    created: datetime | None = None
    generation: int = 0
    annotations: Labels = {}
    deleting: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name

    @property
    def mode(self) -> PolicyMode:
        """Whether it is enforced, or only said what it would deny; what nobody knows is enforced."""
        return "audit" if self.annotations.get(MODE_ANNOTATION) == "audit" else "enforce"


class ServicePort(Struct, frozen=True, gc=False):
    """A port of a Service; `node_port` 0 means none, `target_port` may be the name of a container's port."""

    port: int
    name: str = ""
    protocol: Protocol = "TCP"
    target_port: int | str = 0
    node_port: int = 0


class LoadBalancerIngress(Struct, frozen=True, gc=False):
    """An address (or host name) at which the outside reaches a Service.

    With ip_mode Proxy the load balancer delivers to the nodes itself: the address is not podwall's to serve.
    """

    ip: IPAddress | None = None
    hostname: str = ""
    ip_mode: Literal["VIP", "Proxy"] = "VIP"


class Service(Struct, frozen=True, gc=False):
    """A Service; `cluster_ips` is empty when headless, without an address yet, or ExternalName.

    `selector` is None when missing and `{}` when empty: either way its endpoints are somebody else's.
    `source_ranges` None admits everybody, `()` nobody (every range given was unusable).
    """

    namespace: str
    name: str
    uid: str = ""
    labels: Labels = {}
    annotations: Labels = {}
    created: datetime | None = None
    generation: int = 0
    deleting: bool = False
    type: ServiceType = "ClusterIP"
    headless: bool = False
    cluster_ips: tuple[IPAddress, ...] = ()
    ip_families: tuple[Family, ...] = ()
    ip_family_policy: str = ""
    ports: tuple[ServicePort, ...] = ()
    selector: Labels | None = None
    external_ips: tuple[IPAddress, ...] = ()
    external_name: str = ""
    load_balancer: tuple[LoadBalancerIngress, ...] = ()
    load_balancer_ip: IPAddress | None = None
    load_balancer_class: str | None = None
    source_ranges: tuple[IPNetwork, ...] | None = None
    session_affinity: Literal["None", "ClientIP"] = "None"
    affinity_timeout: int = CLIENT_IP_TIMEOUT  # seconds
    internal_traffic_policy: TrafficPolicy = "Cluster"
    external_traffic_policy: TrafficPolicy = "Cluster"
    health_check_node_port: int = 0
    publish_not_ready_addresses: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name


class ObjectRef(Struct, frozen=True, gc=False):
    """The object behind an endpoint, mostly a Pod."""

    kind: str
    namespace: str
    name: str
    uid: str = ""


class Endpoint(Struct, frozen=True, gc=False):
    """One endpoint; conditions that nobody set have the values the API documentation gives them."""

    addresses: tuple[IPAddress, ...] = ()
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    hostname: str = ""
    node: str = ""
    zone: str = ""
    target: ObjectRef | None = None
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class EndpointPort(Struct, frozen=True, gc=False):
    """A port of all endpoints of a slice; None when the slice does not say which."""

    name: str = ""
    port: int | None = None
    protocol: Protocol = "TCP"


class EndpointSlice(Struct, frozen=True, gc=False):
    """Some of a Service's endpoints, all of one family; `service` is empty for a slice of no Service."""

    namespace: str
    name: str
    uid: str = ""
    labels: Labels = {}
    service: str = ""
    address_type: Literal["IPv4", "IPv6", "FQDN"] = "IPv4"
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    annotations: Labels = {}  # endpoints.kubernetes.io/last-change-trigger-time: when programming began
    deleting: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name


class EndpointsSubset(Struct, frozen=True, gc=False):
    """Addresses that all have the same ports; `ready` of each tells addresses from notReadyAddresses."""

    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()


class Endpoints(Struct, frozen=True, gc=False):
    """The older form of a Service's endpoints; manifests may hold it and it becomes EndpointSlices."""

    namespace: str
    name: str
    uid: str = ""
    labels: Labels = {}
    annotations: Labels = {}
    subsets: tuple[EndpointsSubset, ...] = ()
    deleting: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name


class Lease(Struct, frozen=True, gc=False):
    """Who holds something for how long; an empty `resource_version` is one that was not read from the API."""

    namespace: str
    name: str
    holder: str = ""
    duration_s: int = 15
    acquired: datetime | None = None
    renewed: datetime | None = None
    transitions: int = 0
    resource_version: str = ""
    uid: str = ""


Kind: TypeAlias = Literal["Node", "Namespace", "Pod", "NetworkPolicy", "Service", "EndpointSlice"]
KINDS: tuple[Kind, ...] = ("Node", "Namespace", "Pod", "NetworkPolicy", "Service", "EndpointSlice")
Object: TypeAlias = Node | Namespace | Pod | NetworkPolicy | Service | EndpointSlice
Key: TypeAlias = str | tuple[str, str]


def kind_of(item: Object) -> Kind:
    """The kind of an object, as Kubernetes names it."""
    return cast("Kind", type(item).__name__)


def titled(kind: str, key: Key) -> str:
    """What messages call an object."""
    return f"{kind} {key if isinstance(key, str) else '/'.join(key)}"


class Upsert(Struct, frozen=True, gc=False):
    """An object is there, new or changed."""

    kind: Kind
    object: Object


class Remove(Struct, frozen=True, gc=False):
    """An object is gone."""

    kind: Kind
    key: Key


class Synced(Struct, frozen=True, gc=False):
    """Every object of a kind that existed when the source began has been delivered."""

    kind: Kind


Event: TypeAlias = Upsert | Remove | Synced
