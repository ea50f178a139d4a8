"""What Services get, and which EndpointSlices follow from them."""

from __future__ import annotations

from typing import Any

import pytest

from lab.exposed import ServicePort, read_service
from lab.manifests import parse
from lab.objects import Key, ManifestError, Object, key_of
from lab.processes import LabError
from lab.services import allocate, slices


def service(name: str, spec: str) -> Object:
    text = f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}"
    return parse(text, "test")[0]


def pod(name: str, *addresses: str, port: int = 8080, app: str = "web", **conditions: str) -> Object:
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", "labels": {"app": app}},
        "spec": {"nodeName": "node1", "containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
        "status": {
            "podIPs": [{"ip": address} for address in addresses],
            "conditions": [{"type": kind, "status": value} for kind, value in conditions.items()],
        },
    }


def spec_of(text: str, *others: Object) -> Any:
    return allocate([service("one", text), *others], {})[0]["spec"]


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("ports: [{port: 80}]", ["10.96.0.1"]),
        ("ipFamilyPolicy: PreferDualStack, ports: [{port: 80}]", ["10.96.0.1", "fd00:10:96::1"]),
        ("ipFamilies: [IPv6], ports: [{port: 80}]", ["fd00:10:96::1"]),
        ("clusterIP: 10.96.7.7, ports: [{port: 80}]", ["10.96.7.7"]),
        ("clusterIP: None, selector: {a: b}", ["None"]),
        ("type: ExternalName, externalName: database.example.com", None),
    ],
)
def test_cluster_addresses(text: str, addresses: list[str] | None) -> None:
    assert spec_of(text).get("clusterIPs") == addresses


def test_allocations_are_kept() -> None:
    text = "type: NodePort, ports: [{port: 80}, {port: 53, protocol: UDP}]"
    first = allocate([service("b", text)], {})
    before = {key_of(item): item for item in first}

    again = allocate([service("a", text), service("b", text)], before)

    assert again[1] == first[0]
    assert [port["nodePort"] for port in first[0]["spec"]["ports"]] == [30086, 30086]
    assert [port["nodePort"] for port in again[0]["spec"]["ports"]] == [30087, 30087]
    assert again[0]["spec"]["clusterIP"] != again[1]["spec"]["clusterIP"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clusterIP: 192.0.2.1, ports: [{port: 80}]", "10.96.0.0/16"),
        ("clusterIP: mine, ports: [{port: 80}]", "neither an address nor None"),
        ("clusterIP: 10.96.0.9, ports: [{port: 80}]", "belongs to Service default/other"),
        ("type: NodePort, ports: [{port: 80, nodePort: 80}]", "30000 to 32767"),
        ("type: NodePort, ports: [{port: 80, nodePort: 30080}]", "belongs to Service default/other"),
        ("ports: [{}]", "spec.ports[0].port"),
    ],
)
def test_what_cannot_be_had_names_the_field(text: str, said: str) -> None:
    other = service("other", "type: NodePort, clusterIP: 10.96.0.9, ports: [{port: 80, nodePort: 30080}]")

    with pytest.raises(ManifestError) as caught:
        allocate([other, service("one", text)], {})
    assert said in str(caught.value)
    assert "one" in str(caught.value) or "other" in str(caught.value)


def test_slices_follow_the_selector_per_family() -> None:
    [made] = allocate(
        [
            service(
                "web",
                "selector: {app: web}, ipFamilyPolicy: PreferDualStack, ports: [{port: 8, targetPort: http}]",
            )
        ],
        {},
    )
    pods = [
        pod("a", "10.244.1.2", "fd00::2", Ready="True"),
        pod("b", "10.244.1.3", "fd00::3", Ready="False"),
        pod("pending"),
        pod("other", "10.244.1.9", app="db", Ready="True"),
    ]

    found = slices([made], pods, []).values()

    assert {item["addressType"] for item in found} == {"IPv4", "IPv6"}
    [four] = [item for item in found if item["addressType"] == "IPv4"]
    assert four["ports"] == [{"name": "", "protocol": "TCP", "port": 8080}]
    assert [(e["addresses"], e["conditions"]["ready"]) for e in four["endpoints"]] == [
        (["10.244.1.2"], True),
        (["10.244.1.3"], False),
    ]


def test_a_named_port_with_two_numbers_makes_two_slices() -> None:
    [made] = allocate([service("web", "selector: {app: web}, ports: [{port: 80, targetPort: http}]")], {})
    pods = [pod("a", "10.244.1.2", port=8080), pod("b", "10.244.1.3", port=8081)]

    found = slices([made], pods, []).values()

    assert sorted((item["ports"][0]["port"], item["endpoints"][0]["addresses"][0]) for item in found) == [
        (8080, "10.244.1.2"),
        (8081, "10.244.1.3"),
    ]


def test_a_service_without_pods_has_an_empty_slice() -> None:
    [made] = allocate([service("web", "selector: {app: web}, ports: [{port: 80}]")], {})

    [found] = slices([made], [], []).values()

    assert found["endpoints"] == []


def test_endpoints_are_mirrored_unless_the_service_selects() -> None:
    text = (
        "{kind: Endpoints, apiVersion: v1, metadata: {name: db},"
        " subsets: [{addresses: [{ip: 203.0.113.10}], ports: [{port: 80}]}]}"
    )
    [endpoints] = parse(text, "test")
    without, selecting = (
        service("db", "ports: [{port: 80}]"),
        service("db", "selector: {app: db}, ports: [{port: 80}]"),
    )

    [mirrored] = slices(allocate([without], {}), [], [endpoints]).values()
    [own] = slices(allocate([selecting], {}), [], [endpoints]).values()

    assert mirrored["endpoints"] == [{"addresses": ["203.0.113.10"], "conditions": {"ready": True}}]
    assert own["endpoints"] == []
    assert key_of(mirrored) == Key("EndpointSlice", "default", mirrored["metadata"]["name"])


@pytest.mark.parametrize(
    ("distribution", "hints"),
    [
        (None, None),
        ("PreferClose", {"forZones": [{"name": "a"}]}),
        ("PreferSameZone", {"forZones": [{"name": "a"}]}),
        ("PreferSameNode", {"forNodes": [{"name": "node1"}], "forZones": [{"name": "a"}]}),
    ],
)
def test_ready_endpoints_say_for_whom_they_are_meant(distribution: str | None, hints: Object | None) -> None:
    [made] = allocate([service("web", "selector: {app: web}, ports: [{port: 80}]")], {})
    made["spec"]["trafficDistribution"] = distribution
    pods = [pod("a", "10.244.1.2", Ready="True"), pod("b", "10.244.1.3", Ready="False")]

    [found] = slices([made], pods, [], {"node1": "a"}).values()

    ready, waiting = found["endpoints"]
    assert ready.get("hints") == hints
    assert "hints" not in waiting
    assert ready["zone"] == waiting["zone"] == "a"


def test_a_service_as_its_users_see_it() -> None:
    text = "type: LoadBalancer, externalIPs: [198.51.100.7], ports: [{name: web, port: 80, nodePort: 30080}]"
    [made] = allocate([service("web", text)], {})
    made["status"] = {"loadBalancer": {"ingress": [{"ip": "172.30.0.200"}, {"hostname": "no.address"}]}}

    found = read_service(made)

    assert found.full_name == "default/web"
    assert str(found.address(4)) == made["spec"]["clusterIP"]
    assert str(found.balanced_address(4)) == "172.30.0.200"
    assert [str(address) for address in found.external_addresses] == ["198.51.100.7"]
    assert found.ports == (ServicePort("web", "TCP", 80, 30080),)
    with pytest.raises(LabError, match="default/web: load balancer: there is no IPv6"):
        found.balanced_address(6)
