"""Services and ports of the node as one whole agent serves them, with the real CNI binary and real packets.

lan 172.31.0.1, fd31::1  --  node 172.31.0.11, fd31::11  --  Pods
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from agent.cli import ask as cli
from lab import netns
from lab.processes import until
from lab.runtime import Sandbox
from tests.agent.node import ADDRESSES, NAME, Node, made
from tests.linux import command

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
NODE_AT = dict(zip((4, 6), ADDRESSES, strict=True))
CLUSTER_IP = {4: "10.96.0.10", 6: "fd00:96::10"}
PORT = 7000


@pytest.fixture(scope="module")
def world() -> Iterator[Node]:
    with made() as whole:
        command("ip", "-n", whole.netns, "-6", "route", "add", "default", "via", "fd31::1")
        yield whole


@pytest.fixture
def node(world: Node) -> Iterator[Node]:
    """A node with an agent that is well; at its end no Pod and no Service is left."""
    world.start(**{"address-rest-s": "0.2"})
    world.wait_until_ready()
    yield world
    for box in list(world.boxes):
        world.delete(box)
    for name in ("service", "slice4", "slice6"):
        (world.cluster / f"{name}.json").unlink(missing_ok=True)
    world.kill()


# Servers and clients


class Echo:
    """Answers on a port of a Pod, by TCP and UDP, both families, with a name."""

    def __init__(self, box: Sandbox, name: str, port: int = PORT) -> None:
        self._name = name.encode()
        self._sockets = [
            netns.run(box.path, partial(_bound, str(address), port, kind))
            for address in box.addresses
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        ]
        for each in self._sockets:
            threading.Thread(target=self._serve, args=(each,), daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _serve(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                if listening.type == socket.SOCK_DGRAM:
                    data, client = listening.recvfrom(100)
                    if not data:  # shut down
                        return
                    listening.sendto(self._name, client)
                else:
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(self._name)


def _bound(address: str, port: int, kind: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    made.bind((address, port))
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


@pytest.fixture
def serving() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def echo(serving: contextlib.ExitStack, box: Sandbox, name: str) -> None:
    serving.enter_context(contextlib.closing(Echo(box, name)))


def ask(place: str, address: str, port: int, kind: int = socket.SOCK_STREAM, source: str = "") -> str:
    """Who answers a client in a namespace: a name, "refused" or "silent"."""

    def client() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        made.settimeout(0.5)
        if source:
            made.bind((source, 0))
        return made

    with netns.run(netns.path(place), client) as connection:
        try:
            connection.connect((address, port))
            if kind == socket.SOCK_DGRAM:
                connection.send(b"who?")
            return connection.recv(100).decode()
        except ConnectionRefusedError:
            return "refused"
        except (TimeoutError, PermissionError):
            return "silent"


def eventually(expected: str, *arguments: Any, **keywords: Any) -> None:
    until(lambda: ask(*arguments, **keywords) == expected, 5, lambda: f"{arguments}: not {expected}")


def with_port(node: Node, **fields: Any) -> Sandbox:
    box = node.box()
    mapping = {"hostPort": 8080, "containerPort": PORT, "protocol": "tcp", **fields}
    return dataclasses.replace(box, port_mappings=[mapping])


# Ports of the node


@pytest.mark.parametrize("services", ["on", "off"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_port_of_the_node_leads_to_its_pod(
    node: Node, serving: contextlib.ExitStack, services: str, version: int
) -> None:
    node.stop()
    node.start(services=services)
    node.wait_until_ready()
    for kind, protocol in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
        box = with_port(node, protocol=protocol)
        added = node.added(box)
        echo(serving, added, f"pod by {protocol}")
        for place in (node.lan, node.netns):
            assert ask(place, NODE_AT[version], 8080, kind) == f"pod by {protocol}"
        node.stop()
        node.start(services=services)
        node.wait_until_ready()
        assert ask(node.lan, NODE_AT[version], 8080, kind) == f"pod by {protocol}"
        node.delete(added)
        assert ask(node.lan, NODE_AT[version], 8080, kind) in ("refused", "silent")


def test_host_ports_of_one_address(node: Node, serving: contextlib.ExitStack) -> None:
    """As upstream's conformance test has them: one port for three Pods, by address and by protocol."""
    given = {
        "on the loopback": {"hostIP": "127.0.0.1"},
        "on the node": {"hostIP": NODE_AT[4]},
        "on the node by UDP": {"hostIP": NODE_AT[4], "protocol": "udp"},
    }
    for name, fields in given.items():
        echo(serving, node.added(with_port(node, **fields)), name)
    assert ask(node.lan, NODE_AT[4], 8080) == "on the node"
    assert ask(node.lan, NODE_AT[4], 8080, socket.SOCK_DGRAM) == "on the node by UDP"
    assert ask(node.netns, NODE_AT[4], 8080) == "on the node"
    assert ask(node.netns, "127.0.0.1", 8080, source=NODE_AT[4]) == "on the loopback"
    assert ask(node.lan, NODE_AT[6], 8080) == "refused"


def test_a_host_port_that_is_taken(node: Node, serving: contextlib.ExitStack) -> None:
    first = node.added(with_port(node))
    echo(serving, first, "first")
    said = node.refused(with_port(node, hostIP=NODE_AT[4]))
    assert f"hostPort 8080/tcp on {NODE_AT[4]} is taken by Pod default/{first.pod} on this node" in said
    assert ask(node.lan, NODE_AT[4], 8080) == "first"
    node.delete(first)
    second = node.added(with_port(node, hostIP=NODE_AT[4]))
    echo(serving, second, "second")
    assert ask(node.lan, NODE_AT[4], 8080) == "second"


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_to_a_host_port_follow_its_pods(
    node: Node, serving: contextlib.ExitStack, version: int
) -> None:
    with netns.run(netns.path(node.lan), socket.socket, FAMILY[version], socket.SOCK_DGRAM) as client:
        client.settimeout(0.2)
        client.connect((NODE_AT[version], 8080))
        assert not answered(client), "there is no Pod yet"
        for name in ("first", "second"):
            box = node.added(with_port(node, protocol="udp"))
            echo(serving, box, name)
            until(lambda: answered(client) == name, 5, lambda: f"{name} is not reached")  # noqa: B023
            node.delete(box)


def answered(client: socket.socket) -> str:
    try:
        client.send(b"who?")
        return client.recv(100).decode()
    except (TimeoutError, ConnectionRefusedError, PermissionError):  # the last: refused where it was sent
        return ""


# Services


def write_service(node: Node, **spec: Any) -> None:
    ports = [{"name": "web", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 80, "protocol": "UDP"}]
    node.write(
        "service.json",
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "default", "uid": "service"},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": CLUSTER_IP[4],
                "clusterIPs": list(CLUSTER_IP.values()),
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": ports,
                **spec,
            },
        },
    )


def write_slices(node: Node, *boxes: Sandbox) -> None:
    for version in (4, 6):
        addresses = [str(ip) for box in boxes for ip in box.addresses if ip.version == version]
        endpoints = [{"addresses": [ip], "conditions": {"ready": True}, "nodeName": NAME} for ip in addresses]
        ports = [
            {"name": name, "port": PORT, "protocol": protocol}
            for name, protocol in (("web", "TCP"), ("dns", "UDP"))
        ]
        node.write(
            f"slice{version}.json",
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"web-{version}",
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": "web"},
                },
                "addressType": f"IPv{version}",
                "endpoints": endpoints,
                "ports": ports,
            },
        )


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_follow_the_endpoints(node: Node, serving: contextlib.ExitStack, version: int) -> None:
    boxes = [node.add() for _ in range(3)]
    for number, box in enumerate(boxes):
        echo(serving, box, f"pod {number}")
    write_service(node)
    write_slices(node, boxes[0])
    eventually("pod 0", node.netns, CLUSTER_IP[version], 80)
    with netns.run(netns.path(node.netns), socket.socket, FAMILY[version], socket.SOCK_DGRAM) as client:
        client.settimeout(0.2)
        client.connect((CLUSTER_IP[version], 80))
        assert answered(client) == "pod 0"
        write_slices(node, boxes[1])
        until(lambda: answered(client) == "pod 1", 5, lambda: "the flow stays with what is gone")
        write_slices(node)
        until(lambda: not answered(client), 5, lambda: "the last endpoint stays")
        node.stop()
        write_slices(node, boxes[2])
        node.start()
        node.wait_until_ready()
        until(lambda: answered(client) == "pod 2", 5, lambda: "the flow does not find the new endpoint")
        node.stop()  # it is away while the endpoint changes
        write_slices(node, boxes[0])
        assert answered(client) == "pod 2"
        node.start()
        until(lambda: answered(client) == "pod 0", 5, lambda: "an old flow outlives the agent's absence")


def test_a_restart_commits_nothing_and_connections_go_on(node: Node, serving: contextlib.ExitStack) -> None:
    box = node.add()
    echo(serving, box, "pod")
    write_service(node, sessionAffinity="ClientIP")
    write_slices(node, box)
    eventually("pod", node.netns, CLUSTER_IP[4], 80)
    before = node.ruleset()
    node.stop()
    node.start()
    node.wait_until_ready()
    status: Any = cli.ask(node.agent.socket, "status", {})
    assert (status["services"]["state"], status["services"]["commits"]) == ("on", 0)
    assert services_table(node.ruleset()) == services_table(before)


def services_table(ruleset: str) -> list[str]:
    """The table, without how long the kernel will remember its clients."""
    text = ruleset.partition("table inet podwall_services")[2].partition("\n}\n")[0]
    return [line.split(" expires ")[0] for line in text.splitlines()]


def test_a_removed_table_is_back_within_a_second(node: Node, serving: contextlib.ExitStack) -> None:
    box = node.add()
    echo(serving, box, "pod")
    write_service(node)
    write_slices(node, box)
    eventually("pod", node.netns, CLUSTER_IP[4], 80)
    links = node.ruleset().partition("table inet podwall {")[2]
    command("ip", "netns", "exec", node.netns, "nft", "delete", "table", "inet", "podwall_services")
    begun = time.monotonic()
    eventually("pod", node.netns, CLUSTER_IP[4], 80)
    assert time.monotonic() - begun < 1
    assert links.partition("\n}\n")[0] in node.ruleset()


def test_health_checks_are_answered_from_outside(node: Node) -> None:
    box = node.add()
    write_service(node, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=31000)
    write_slices(node, box)
    for version in (4, 6):
        until(lambda: health(node, version) == (200, 1), 5, lambda: "not 200")  # noqa: B023
    write_slices(node)
    until(lambda: health(node, 4) == (503, 0), 5, lambda: "not 503")


def health(node: Node, version: int) -> tuple[int, int]:
    """The status and number that the node's health check answers."""
    host = NODE_AT[version] if version == 4 else f"[{NODE_AT[version]}]"

    def get() -> tuple[int, int]:
        try:
            with urllib.request.urlopen(f"http://{host}:31000/", timeout=5) as answer:
                return answer.status, json.loads(answer.read())["localEndpoints"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())["localEndpoints"]
        except OSError:
            return 0, 0

    return netns.run(netns.path(node.lan), get)
