"""What the API says, and what podwall makes of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec
import pytest

from agent.cluster.decode import DecodeError, decode, decode_change, decode_page, decode_status
from agent.cluster.model import (
    ContainerPort,
    Endpoint,
    EndpointPort,
    IPBlock,
    LabelSelector,
    Owner,
    PolicyPort,
    Problem,
    Requirement,
    SelectorPeer,
    ServicePort,
)


def read(kind: Any, **body: Any) -> Any:
    """An object of this body, through bytes and through dicts alike."""
    body.setdefault("metadata", {"name": "x", "namespace": "n"})
    item = decode(kind, json.dumps(body).encode())
    assert decode(kind, body) == item
    return item


def fields(item: Any) -> list[str]:
    return [problem.field for problem in item.problems]


# Nodes, Namespaces, Pods


def test_node() -> None:
    node = read(
        "Node",
        metadata={"name": "a", "uid": "u", "labels": {"l": "1"}, "annotations": {"k": "v"}},
        spec={"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
        status={
            "addresses": [
                {"type": "InternalIP", "address": "172.18.0.2"},
                {"type": "ExternalIP", "address": "192.0.2.2"},
                {"type": "Hostname", "address": "a"},
                {"type": "InternalIP", "address": "fc00::2"},
            ],
            "conditions": [
                {"type": "NetworkUnavailable", "status": "True"},
                {"type": "Ready", "status": "True"},
            ],
        },
    )
    assert node.key == "a"
    assert node.pod_cidrs == (ip_network("10.244.1.0/24"), ip_network("fd00:1::/64"))
    assert node.internal_ips == (ip_address("172.18.0.2"), ip_address("fc00::2"))
    assert node.external_ips == (ip_address("192.0.2.2"),)
    assert (node.ready, node.deleting, node.network_unavailable) == (True, False, True)
    assert (node.labels, node.annotations, node.problems) == ({"l": "1"}, {"k": "v"}, ())


def test_a_cordoned_node() -> None:
    assert [read("Node", spec={"unschedulable": value}).unschedulable for value in (True, False)] == [
        True,
        False,
    ]
    assert not read("Node").unschedulable


def test_node_of_an_old_manifest_has_one_cidr() -> None:
    assert read("Node", spec={"podCIDR": "10.1.0.0/16"}).pod_cidrs == (ip_network("10.1.0.0/16"),)


def test_node_with_unusable_values_keeps_the_others() -> None:
    node = read(
        "Node",
        spec={"podCIDRs": ["10.0.0.041/24", "10.1.0.0/24"]},
        status={"addresses": [{"type": "InternalIP", "address": "fe80::1%eth0"}]},
    )
    assert node.pod_cidrs == (ip_network("10.1.0.0/24"),)
    assert node.internal_ips == ()
    assert fields(node) == ["spec.podCIDRs[0]", "status.addresses[0].address"]


def test_namespace_has_its_name_as_a_label_whatever_it_says() -> None:
    labels = {"kubernetes.io/metadata.name": "other", "team": "a"}
    namespace = read(
        "Namespace", metadata={"name": "mine", "labels": labels, "deletionTimestamp": "2025-01-01T0:0:0Z"}
    )
    assert namespace.labels == {"kubernetes.io/metadata.name": "mine", "team": "a"}
    assert namespace.deleting


POD: dict[str, Any] = {
    "metadata": {
        "name": "web-0",
        "namespace": "shop",
        "uid": "u",
        "labels": {"app": "web"},
        "ownerReferences": [{"kind": "StatefulSet", "name": "web", "uid": "o", "controller": True}],
    },
    "spec": {
        "nodeName": "a",
        "hostname": "web-0",
        "subdomain": "web",
        "initContainers": [
            {"name": "setup", "ports": [{"containerPort": 1}]},
            {"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "http", "containerPort": 15001}]},
        ],
        "containers": [
            {"name": "plain"},
            {
                "name": "web",
                "ports": [
                    {"name": "http", "containerPort": 8080, "protocol": "TCP"},
                    {
                        "name": "dns",
                        "containerPort": 53,
                        "protocol": "UDP",
                        "hostPort": 5353,
                        "hostIP": "192.0.2.1",
                    },
                ],
            },
        ],
    },
    "status": {
        "phase": "Running",
        "podIP": "10.244.1.5",
        "podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd00:1::5"}],
        "conditions": [{"type": "Initialized", "status": "False"}, {"type": "Ready", "status": "True"}],
    },
}


def test_pod() -> None:
    pod = read("Pod", **POD)
    assert pod.key == ("shop", "web-0")
    assert (pod.node, pod.phase, pod.ready, pod.host_network, pod.deleting) == (
        "a",
        "Running",
        True,
        False,
        False,
    )
    assert (pod.hostname, pod.subdomain) == ("web-0", "web")
    assert pod.ips == (ip_address("10.244.1.5"), ip_address("fd00:1::5"))
    assert pod.owners == (Owner("StatefulSet", "web", "o", True),)
    assert pod.ports == (
        ContainerPort("http", 8080),
        ContainerPort("dns", 53, "UDP", 5353, ip_address("192.0.2.1")),
        ContainerPort("http", 15001, role="sidecar"),
        ContainerPort("", 1, role="init"),
    )
    assert not pod.finished


def test_pod_that_nobody_has_scheduled() -> None:
    pod = read("Pod", spec={"containers": [{"name": "c"}]}, status={})
    assert (pod.node, pod.phase, pod.ips, pod.ready) == ("", "Pending", (), False)


def test_nulls_are_missing_fields() -> None:
    nulls = {"labels": None, "creationTimestamp": None, "ownerReferences": None, "deletionTimestamp": None}
    pod = read(
        "Pod",
        metadata={"name": "x", "namespace": None, "uid": None, **nulls},
        spec={"containers": None, "initContainers": None, "hostNetwork": None},
        status={"podIPs": None, "podIP": "", "conditions": None, "phase": None},
    )
    assert pod.key == ("default", "x")
    assert not pod.problems


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"status": {"phase": "Sleeping"}}, "status.phase"),
        ({"status": {"podIPs": [{"ip": "10.0.0.256"}]}}, "status.podIPs[0].ip"),
        ({"status": {"podIPs": [{"ip": "::ffff:10.0.0.1"}]}}, "status.podIPs[0].ip"),
        (
            {"spec": {"containers": [{"ports": [{"containerPort": 0}]}]}},
            "spec.containers[0].ports[0].containerPort",
        ),
        (
            {"spec": {"containers": [{"ports": [{"containerPort": "80"}]}]}},
            "spec.containers[0].ports[0].containerPort",
        ),
        (
            {"spec": {"containers": [{"ports": [{"containerPort": 1, "protocol": "ICMP"}]}]}},
            "spec.containers[0].ports[0].protocol",
        ),
        ({"spec": {"hostNetwork": "yes"}}, "spec.hostNetwork"),
        ({"spec": {"containers": "none"}}, "spec.containers"),
        ({"spec": 7}, "spec"),
    ],
)
def test_pod_with_one_unusable_field(change: dict[str, Any], field: str) -> None:
    pod = read("Pod", **change)
    assert fields(pod) == [field]
    assert pod.ports == ()


def test_a_host_port_of_an_unusable_address_is_no_host_port() -> None:
    port = {"containerPort": 80, "hostPort": 80, "hostIP": "localhost"}
    pod = read("Pod", spec={"containers": [{"ports": [port]}]})
    assert pod.ports == (ContainerPort("", 80),)
    assert fields(pod) == ["spec.containers[0].ports[0].hostIP"]


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        ("Pod", {}, "(the whole object)"),
        ("Pod", {"metadata": None}, "metadata"),
        ("Pod", {"metadata": {"namespace": "n"}}, "metadata.name"),
        ("Pod", {"metadata": {"name": 7}}, "metadata.name"),
        ("Pod", {"metadata": {"name": "x", "labels": {"a": 1}}}, "metadata.labels"),
        ("Namespace", {"metadata": {"name": "x", "labels": ["a"]}}, "metadata.labels"),
        ("NetworkPolicy", {"metadata": {"name": ""}, "spec": {}}, "metadata.name"),
    ],
)
def test_an_object_without_identity_is_refused(kind: Any, body: dict[str, Any], field: str) -> None:
    with pytest.raises(DecodeError) as refused:
        decode(kind, json.dumps(body).encode())
    assert refused.value.field == field


def test_what_is_no_json_is_refused() -> None:
    for data in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(DecodeError, match="is not JSON"):
            decode("Pod", data)


@pytest.mark.parametrize("name", ["a\nb", "a b", "-", "A", "a/b", 'a"; flush ruleset', "x" * 254, "Ünsinn"])
def test_hostile_names_are_kept_and_named(name: str) -> None:
    policy = read("NetworkPolicy", metadata={"name": name, "namespace": "n"}, spec={"podSelector": {}})
    assert policy.name == name
    assert fields(policy) == ["metadata.name"]
    assert "\n" not in str(policy.problems[0])


# Policies


def policy(**spec: Any) -> Any:
    return read("NetworkPolicy", spec=spec)


def test_policy_with_every_field() -> None:
    result = read(
        "NetworkPolicy",
        metadata={
            "name": "api",
            "namespace": "shop",
            "uid": "u",
            "generation": 3,
            "creationTimestamp": "2025-11-20T10:00:00Z",
            "annotations": {"podwall.dev/mode": "audit"},
        },
        spec={
            "podSelector": {"matchLabels": {"b": "2", "a": "1"}},
            "policyTypes": ["Egress", "Ingress"],
            "ingress": [
                {
                    "from": [
                        {
                            "podSelector": {
                                "matchExpressions": [
                                    {"key": "tier", "operator": "NotIn", "values": ["z", "y", "z"]},
                                    {"key": "app", "operator": "Exists"},
                                ]
                            },
                            "namespaceSelector": {},
                        },
                        {"ipBlock": {"cidr": "10.0.0.7/8", "except": ["10.1.0.0/16"]}},
                    ],
                    "ports": [
                        {"port": "http"},
                        {"protocol": "UDP", "port": 53, "endPort": 60},
                        {"protocol": "SCTP"},
                    ],
                }
            ],
            "egress": [{}],
        },
    )
    assert result.problems == ()
    assert (result.generation, result.created) == (3, datetime(2025, 11, 20, 10, tzinfo=UTC))
    assert result.annotations == {"podwall.dev/mode": "audit"}
    assert result.pod_selector == LabelSelector((("a", "1"), ("b", "2")))
    assert result.policy_types == {"Ingress", "Egress"}
    (rule,) = result.ingress
    expressions = (Requirement("app", "Exists"), Requirement("tier", "NotIn", ("y", "z")))
    assert rule.peers == (
        SelectorPeer(LabelSelector((), expressions), LabelSelector()),
        IPBlock(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),)),
    )
    assert rule.ports == (PolicyPort("TCP", "http"), PolicyPort("UDP", 53, 60), PolicyPort("SCTP"))
    assert [(rule.peers, rule.ports) for rule in result.egress] == [(None, None)]


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ({}, {"Ingress"}),
        ({"policyTypes": []}, {"Ingress"}),
        ({"policyTypes": None, "egress": None}, {"Ingress"}),
        ({"egress": []}, {"Ingress"}),
        ({"egress": [{}]}, {"Ingress", "Egress"}),
        ({"policyTypes": ["Egress"]}, {"Egress"}),
        ({"policyTypes": ["Ingress"], "egress": [{}]}, {"Ingress"}),
    ],
)
def test_policy_types_by_default(spec: dict[str, Any], types: set[str]) -> None:
    result = policy(**spec)
    assert result.policy_types == types
    assert not result.problems


@pytest.mark.parametrize(
    ("rule", "peers", "ports"),
    [
        ({}, None, None),
        ({"from": [], "ports": []}, (), ()),
        ({"from": None, "ports": None}, None, None),
        ({"from": [{"podSelector": {}}]}, (SelectorPeer(LabelSelector(), None),), None),
        ({"from": [{"namespaceSelector": {}}]}, (SelectorPeer(None, LabelSelector()),), None),
    ],
)
def test_missing_is_not_empty(rule: dict[str, Any], peers: Any, ports: Any) -> None:
    (result,) = policy(ingress=[rule]).ingress
    assert (result.peers, result.ports) == (peers, ports)


UNUSABLE_PEERS: dict[str, tuple[Any, str]] = {
    "null": (None, ""),
    "text": ("10.0.0.0/8", ""),
    "empty": ({}, ""),
    "unknown field": ({"ipblock": {"cidr": "10.0.0.0/8"}}, ".ipblock"),
    "a field of the future": ({"podSelector": {}, "serviceSelector": {}}, ".serviceSelector"),
    "block and selector": ({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}, ""),
    "leading zero": ({"ipBlock": {"cidr": "10.0.0.041/32"}}, ".ipBlock.cidr"),
    "address": ({"ipBlock": {"cidr": "10.0.0.1"}}, ".ipBlock.cidr"),
    "no cidr": ({"ipBlock": {}}, ".ipBlock.cidr"),
    "netmask": ({"ipBlock": {"cidr": "10.0.0.0/255.0.0.0"}}, ".ipBlock.cidr"),
    "prefix too long": ({"ipBlock": {"cidr": "10.0.0.0/33"}}, ".ipBlock.cidr"),
    "mapped": ({"ipBlock": {"cidr": "::ffff:10.0.0.0/104"}}, ".ipBlock.cidr"),
    "except outside": ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}, ".ipBlock.except[0]"),
    "except equal": ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}, ".ipBlock.except[0]"),
    "except wider": ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["0.0.0.0/0"]}}, ".ipBlock.except[0]"),
    "except of the other family": (
        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["fd00::/64"]}},
        ".ipBlock.except[0]",
    ),
    "except no list": ({"ipBlock": {"cidr": "10.0.0.0/8", "except": "10.1.0.0/16"}}, ".ipBlock.except"),
    "unknown operator": (
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}},
        ".podSelector.matchExpressions[0].operator",
    ),
    "In without values": (
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
        ".podSelector.matchExpressions[0].values",
    ),
    "Exists with values": (
        {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}},
        ".namespaceSelector.matchExpressions[0].values",
    ),
    "a number as a label": ({"podSelector": {"matchLabels": {"a": 1}}}, ".podSelector.matchLabels.a"),
    "no label key": ({"podSelector": {"matchLabels": {"a b": "1"}}}, ".podSelector.matchLabels.'a b'"),
    "unknown in selector": ({"podSelector": {"matchlabels": {"a": "1"}}}, ".podSelector.matchlabels"),
}


@pytest.mark.parametrize(("peer", "field"), UNUSABLE_PEERS.values(), ids=UNUSABLE_PEERS)
def test_an_unusable_peer_matches_nothing_and_stays_in_its_place(peer: Any, field: str) -> None:
    good = {"podSelector": {"matchLabels": {"a": "b"}}}
    result = policy(ingress=[{"from": [good, peer, good]}])
    (rule,) = result.ingress
    first, problem, last = rule.peers
    assert first == last == SelectorPeer(LabelSelector((("a", "b"),)))
    assert isinstance(problem, Problem)
    assert problem.field == f"spec.ingress[0].from[1]{field}"
    assert problem in result.problems


UNUSABLE_PORTS: dict[str, tuple[Any, str]] = {
    "null": (None, ""),
    "number": (80, ""),
    "zero": ({"port": 0}, ".port"),
    "too large": ({"port": 65536}, ".port"),
    "negative": ({"port": -1}, ".port"),
    "float": ({"port": 80.5}, ".port"),
    "boolean": ({"port": True}, ".port"),
    "quoted number": ({"port": "80"}, ".port"),
    "long name": ({"port": "a-name-that-is-too-long"}, ".port"),
    "protocol": ({"protocol": "ICMP"}, ".protocol"),
    "lower case": ({"protocol": "tcp"}, ".protocol"),
    "empty protocol": ({"protocol": ""}, ".protocol"),
    "end alone": ({"endPort": 90}, ".endPort"),
    "end of a name": ({"port": "http", "endPort": 90}, ".endPort"),
    "end before port": ({"port": 90, "endPort": 80}, ".endPort"),
    "end too large": ({"port": 90, "endPort": 70000}, ".endPort"),
    "a field of the future": ({"port": 80, "sourcePort": 1}, ".sourcePort"),
}


@pytest.mark.parametrize(("port", "field"), UNUSABLE_PORTS.values(), ids=UNUSABLE_PORTS)
def test_an_unusable_port_matches_nothing(port: Any, field: str) -> None:
    result = policy(egress=[{"ports": [port, {"port": 443}]}])
    (rule,) = result.egress
    problem, good = rule.ports
    assert good == PolicyPort("TCP", 443)
    assert isinstance(problem, Problem)
    assert problem.field == f"spec.egress[0].ports[0]{field}"
    assert problem in result.problems


@pytest.mark.parametrize("value", ["x", 7, {"a": 1}, True, [None], ["x"], [[]]])
@pytest.mark.parametrize("part", ["rules", "peers", "ports"])
def test_a_list_of_the_wrong_type_allows_nothing(part: str, value: Any) -> None:
    spec = {"rules": value, "peers": [{"from": value}], "ports": [{"ports": value}]}[part]
    result = policy(ingress=spec)
    assert result.problems
    for rule in result.ingress:
        members = rule.peers if part == "rules" else rule.peers if part == "peers" else rule.ports
        assert members
        assert all(isinstance(member, Problem) for member in members)


@pytest.mark.parametrize("spec", [None, {}, {"podSelector": None}])
def test_no_spec_isolates_the_namespace(spec: Any) -> None:
    result = read("NetworkPolicy", spec=spec)
    assert (result.pod_selector, result.policy_types, result.ingress) == (LabelSelector(), {"Ingress"}, ())


@pytest.mark.parametrize("spec", ["x", 7, [], True])
def test_a_spec_of_the_wrong_type_isolates_both_ways(spec: Any) -> None:
    result = read("NetworkPolicy", spec=spec)
    assert result.policy_types == {"Ingress", "Egress"}
    assert (result.ingress, result.egress, fields(result)) == ((), (), ["spec"])


@pytest.mark.parametrize(
    ("selector", "selects"),
    [
        ("x", LabelSelector()),
        ({"matchLabels": {"a": 1, "b": "2"}}, LabelSelector((("b", "2"),))),
        (
            {"matchLabels": {"b": "2"}, "matchExpressions": [{"key": "a", "operator": "Near"}]},
            LabelSelector((("b", "2"),)),
        ),
        ({"matchLabels": {"b": "2"}, "matchExpressions": 3}, LabelSelector((("b", "2"),))),
        ({"matchLabels": {"b": "2"}, "matchFields": {}}, LabelSelector((("b", "2"),))),
    ],
)
def test_an_unusable_pod_selector_selects_more_and_allows_nothing(
    selector: Any, selects: LabelSelector
) -> None:
    result = policy(podSelector=selector, policyTypes=["Ingress", "Egress"], ingress=[{}], egress=[{}])
    assert result.pod_selector == selects
    assert (result.ingress, result.egress) == ((), ())
    assert result.policy_types == {"Ingress", "Egress"}
    assert result.problems


@pytest.mark.parametrize("types", ["Ingress", ["ingress"], ["Ingress", "Egres"], [None], {"Ingress": True}])
def test_an_unusable_policy_type_isolates_both_ways(types: Any) -> None:
    result = policy(policyTypes=types, ingress=[{}])
    assert result.policy_types == {"Ingress", "Egress"}
    assert len(result.problems) == 1


def test_metadata_of_the_wrong_type_leaves_the_policy_in_force() -> None:
    metadata = {
        "name": "x",
        "namespace": "n",
        "annotations": {"a": 1},
        "labels": 3,
        "creationTimestamp": "soon",
    }
    result = read("NetworkPolicy", metadata=metadata, spec={"policyTypes": ["Egress"]})
    assert result.policy_types == {"Egress"}
    assert set(fields(result)) == {"metadata.annotations", "metadata.labels", "metadata.creationTimestamp"}


def test_ten_thousand_ports() -> None:
    (rule,) = policy(ingress=[{"ports": [{"port": 1 + number} for number in range(10_000)]}]).ingress
    assert len(rule.ports) == 10_000


# Services and endpoints


def test_service_with_every_field() -> None:
    service = read(
        "Service",
        metadata={
            "name": "s",
            "namespace": "n",
            "labels": {"l": "1"},
            "creationTimestamp": "2025-11-20T10:00:00Z",
        },
        spec={
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7", "fd00:96::7"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                {"name": "web", "port": 80, "targetPort": "http", "nodePort": 30080, "appProtocol": "h2c"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
            "selector": {"app": "a"},
            "externalIPs": ["192.0.2.1"],
            "loadBalancerIP": "192.0.2.2",
            "loadBalancerClass": "podwall.dev/announce",
            "loadBalancerSourceRanges": [" 198.51.100.0/24 "],
            "allocateLoadBalancerNodePorts": False,
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 3600}},
            "internalTrafficPolicy": "Local",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 31000,
            "publishNotReadyAddresses": True,
            "trafficDistribution": "PreferClose",
        },
        status={
            "loadBalancer": {
                "ingress": [{"ip": "192.0.2.2", "ipMode": "Proxy"}, {"hostname": "lb.example.com"}]
            }
        },
    )
    assert service.problems == ()
    assert service.cluster_ips == (ip_address("10.96.0.7"), ip_address("fd00:96::7"))
    assert (service.ip_families, service.ip_family_policy) == ((4, 6), "PreferDualStack")
    assert service.ports == (
        ServicePort(80, "web", "TCP", "http", 30080),
        ServicePort(53, "dns", "UDP", 53),
    )
    assert service.source_ranges == (ip_network("198.51.100.0/24"),)
    assert service.load_balancer_ip == ip_address("192.0.2.2")
    assert [(str(i.ip), i.hostname, i.ip_mode) for i in service.load_balancer] == [
        ("192.0.2.2", "", "Proxy"),
        ("None", "lb.example.com", "VIP"),
    ]
    assert (service.session_affinity, service.affinity_timeout) == ("ClientIP", 3600)
    assert (service.internal_traffic_policy, service.external_traffic_policy) == ("Local", "Local")
    assert service.publish_not_ready_addresses
    assert service.created == datetime(2025, 11, 20, 10, tzinfo=UTC)


def test_service_by_default() -> None:
    service = read("Service", spec={"ports": [{"port": 80}]})
    assert (service.type, service.session_affinity, service.affinity_timeout) == ("ClusterIP", "None", 10800)
    assert (service.internal_traffic_policy, service.external_traffic_policy) == ("Cluster", "Cluster")
    assert service.ports == (ServicePort(80, target_port=80),)
    assert (service.selector, service.source_ranges) == (None, None)


@pytest.mark.parametrize(
    ("spec", "headless", "ips"),
    [
        ({"clusterIP": "None"}, True, 0),
        ({"clusterIP": "None", "clusterIPs": ["None"]}, True, 0),
        ({"clusterIP": ""}, False, 0),
        ({"clusterIP": "10.96.0.1"}, False, 1),
        ({"type": "ExternalName", "clusterIP": "10.96.0.1", "externalName": "db.example.com"}, False, 0),
    ],
)
def test_cluster_ips(spec: dict[str, Any], headless: bool, ips: int) -> None:
    service = read("Service", spec=spec)
    assert (service.headless, len(service.cluster_ips), service.problems) == (headless, ips, ())


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"type": "Magic"}, "spec.type"),
        ({"clusterIPs": ["10.96.0.041"]}, "spec.clusterIPs[0]"),
        ({"externalIPs": ["example.com"]}, "spec.externalIPs[0]"),
        ({"ports": [{"port": 0}]}, "spec.ports[0].port"),
        ({"ports": [{"port": "80"}]}, "spec.ports[0].port"),
        ({"ports": [{"port": 80, "targetPort": "-"}]}, "spec.ports[0].targetPort"),
        ({"ports": [{"port": 80, "targetPort": 70000}]}, "spec.ports[0].targetPort"),
        ({"ports": [{"port": 80, "protocol": "QUIC"}]}, "spec.ports[0].protocol"),
        ({"ports": [7]}, "spec.ports[0]"),
        ({"sessionAffinity": "Cookie"}, "spec.sessionAffinity"),
        (
            {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}},
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
        ({"externalTrafficPolicy": "Near"}, "spec.externalTrafficPolicy"),
        ({"ipFamilies": ["IPv5"]}, "spec.ipFamilies[0]"),
    ],
)
def test_service_with_one_unusable_field(spec: dict[str, Any], field: str) -> None:
    service = read("Service", spec=spec)
    assert fields(service) == [field]
    assert service.ports == ()


@pytest.mark.parametrize("ranges", [["nonsense"], "10.0.0.0/8", [7], ["10.0.0.0/8/8", None]])
def test_unusable_source_ranges_admit_nobody(ranges: Any) -> None:
    service = read("Service", spec={"loadBalancerSourceRanges": ranges})
    assert service.source_ranges == ()
    assert service.problems


def test_slice() -> None:
    item = read(
        "EndpointSlice",
        metadata={"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
        addressType="IPv6",
        endpoints=[
            {"addresses": ["fd00::1"], "conditions": {"ready": None}, "nodeName": "a", "zone": "z"},
            {"addresses": ["fd00::2"], "conditions": {"ready": False, "serving": True, "terminating": True}},
            {"addresses": ["fd00::3"], "conditions": {"ready": False}, "hostname": "h"},
            {"addresses": ["10.0.0.1"]},
            {
                "addresses": ["fd00::4"],
                "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "a"}]},
                "targetRef": {"kind": "Pod", "namespace": "n", "name": "p", "uid": "u"},
            },
        ],
        ports=[{"name": "web", "port": 8080, "protocol": "TCP"}, {"name": "any"}, {"port": 0}],
    )
    assert (item.service, item.address_type) == ("s", "IPv6")
    conditions = [(e.ready, e.serving, e.terminating) for e in item.endpoints]
    assert conditions[:3] == [(True, True, False), (False, True, True), (False, False, False)]
    assert item.endpoints[0] == Endpoint((ip_address("fd00::1"),), node="a", zone="z")
    last = item.endpoints[4]
    assert (last.zone_hints, last.node_hints, last.target.name) == (("z",), ("a",), "p")
    assert item.endpoints[3].addresses == ()
    assert item.ports == (EndpointPort("web", 8080), EndpointPort("any", None))
    assert fields(item) == ["endpoints[3].addresses[0]", "ports[2].port"]


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "10.0.0.041"])
def test_no_endpoint_is_there(address: str) -> None:
    item = read("EndpointSlice", addressType="IPv4", endpoints=[{"addresses": [address]}])
    assert item.endpoints[0].addresses == ()
    assert fields(item) == ["endpoints[0].addresses[0]"]


def test_a_slice_of_names_or_of_nonsense_has_no_addresses() -> None:
    names = read("EndpointSlice", addressType="FQDN", endpoints=[{"addresses": ["db.example.com"]}])
    assert (names.endpoints[0].addresses, names.problems) == ((), ())
    nonsense = read("EndpointSlice", addressType="IPX", endpoints=[{"addresses": ["10.0.0.1"]}])
    assert (nonsense.endpoints[0].addresses, fields(nonsense)) == ((), ["addressType"])


# Lists and watches


def test_a_page_with_a_bad_object_has_all_others() -> None:
    good = [{"metadata": {"name": f"p{number}", "namespace": "n"}} for number in range(3)]
    bad = [{"metadata": {"namespace": "n"}}, {"metadata": {"name": 7}}]
    odd = {"metadata": {"name": "odd"}, "spec": {"hostNetwork": 1}}
    body = {"metadata": {"resourceVersion": "9", "continue": "c"}, "items": [*good, *bad, odd]}
    page = decode_page("Pod", json.dumps(body).encode())
    assert [item.key for item in page.objects] == [("n", "p0"), ("n", "p1"), ("n", "p2"), ("default", "odd")]
    assert len(page.refused) == 2
    assert (page.resource_version, page.continues) == ("9", "c")
    assert fields(page.objects[-1]) == ["spec.hostNetwork"]


def test_an_empty_page() -> None:
    page = decode_page("Pod", b'{"metadata":{"resourceVersion":"1"},"items":null}')
    assert (page.objects, page.continues) == ((), "")


def event(type_: str, **item: Any) -> bytes:
    return json.dumps({"type": type_, "object": item}, separators=(",", ":")).encode()


def test_changes() -> None:
    meta = {"name": "x", "namespace": "n", "resourceVersion": "5"}
    added = decode_change("Pod", event("ADDED", metadata=meta))
    assert (added.type, added.key, added.resource_version) == ("ADDED", ("n", "x"), "5")
    odd = decode_change("Pod", event("MODIFIED", metadata=meta, spec={"hostNetwork": 1}))
    assert (odd.key, odd.resource_version) == (("n", "x"), "5")
    assert fields(odd.object) == ["spec.hostNetwork"]
    deleted = decode_change("Pod", event("DELETED", metadata=meta))
    assert (deleted.key, deleted.object, deleted.resource_version) == (("n", "x"), None, "5")
    node = decode_change("Node", event("DELETED", metadata={"name": "a", "resourceVersion": "6"}))
    assert node.key == "a"
    bookmark = decode_change("Pod", event("BOOKMARK", metadata={"resourceVersion": "7"}))
    assert (bookmark.key, bookmark.object, bookmark.resource_version) == (None, None, "7")
    gone = decode_change("Pod", event("ERROR", kind="Status", code=410, message="too old"))
    assert gone.status is not None
    assert (gone.status.code, gone.status.message) == (410, "too old")


def test_a_refused_change_moves_the_version_on() -> None:
    change = decode_change("Pod", event("ADDED", metadata={"resourceVersion": "8", "name": 5}))
    assert (change.resource_version, change.object) == ("8", None)
    assert change.refused is not None


def test_a_line_that_is_no_event() -> None:
    for line in (b"", b"[]", b'{"type":"ADDED"}', b'{"type":"ADDED","obj'):
        with pytest.raises(msgspec.DecodeError):
            decode_change("Pod", line)


def test_a_status_that_is_none() -> None:
    assert decode_status(b"<html>bad gateway</html>").code == 0
