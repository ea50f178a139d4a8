"""Requests against the specification: what is good, what is bad, and which number and name the bad gets."""

import pytest

from cni import spec

ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "3f69",
    "CNI_IFNAME": "eth0",
    "CNI_NETNS": "/run/netns/blue",
    "CNI_ARGS": "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0",
}
CONFIG = {"cniVersion": "1.1.0", "name": "podwall", "type": "podwall"}
RATES = {"ingressRate": 8000, "ingressBurst": 8, "egressRate": 16000, "egressBurst": 16}


def request(command="ADD", environment=None, config=None):
    given = spec.parameters({**ENVIRONMENT, "CNI_COMMAND": command, **(environment or {})})
    return spec.request(given, {**CONFIG, **(config or {})})


def test_a_request_comes_over_the_socket_as_it_went():
    asked = request()
    assert spec.from_body("cni.ADD", asked.body()) == asked
    assert asked.args == {"K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-0"}
    assert asked.socket == "/run/podwall/agent.sock"


@pytest.mark.parametrize("container_id", ["a", "0", "3f6940ab", "A.b_c-d", "x" * 256])
def test_good_container_ids(container_id):
    assert request(environment={"CNI_CONTAINERID": container_id}).container_id == container_id


@pytest.mark.parametrize(
    "container_id",
    ["", "-a", ".a", "_a", "a/b", "..", "a b", "a\n", "a\0", "a;b", "\u00e4", "\u0661", "x" * 257],
)
def test_bad_container_ids(container_id):
    with pytest.raises(spec.CniError, match="CNI_CONTAINERID") as caught:
        request(environment={"CNI_CONTAINERID": container_id})
    assert caught.value.code == 4


@pytest.mark.parametrize("ifname", ["eth0", "a", "x" * 15, "net1.100", "...", "\u00e4\u00e4\u00e4"])
def test_good_interface_names(ifname):
    assert request(environment={"CNI_IFNAME": ifname}).ifname == ifname


@pytest.mark.parametrize(
    "ifname", ["", ".", "..", "x" * 16, "\u00e4" * 8, "a/b", "a:b", "a b", "a\tb", "a\n", "a\u00a0b", "a\0"]
)
def test_bad_interface_names(ifname):
    with pytest.raises(spec.CniError, match="CNI_IFNAME") as caught:
        request(environment={"CNI_IFNAME": ifname})
    assert caught.value.code == 4


@pytest.mark.parametrize("netns", ["", "run/netns", "./x", "/a\0b", "/" + "x" * 4096])
def test_bad_namespace_paths(netns):
    with pytest.raises(spec.CniError, match="CNI_NETNS") as caught:
        request(environment={"CNI_NETNS": netns})
    assert caught.value.code == 4


def test_del_needs_no_namespace():
    assert request("DEL", {"CNI_NETNS": ""}).netns == ""


def test_every_bad_variable_is_named_at_once():
    with pytest.raises(spec.CniError) as caught:
        spec.parameters({"CNI_COMMAND": "ADD"})
    for name in ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"):
        assert name in caught.value.msg


@pytest.mark.parametrize("command", ["", "add", "UPDATE", "ADD "])
def test_unknown_commands(command):
    with pytest.raises(spec.CniError, match="CNI_COMMAND") as caught:
        request(command)
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("", {}),
        ("A=1", {"A": "1"}),
        ("A=1;B=", {"A": "1", "B": ""}),
        ("A=1;", {"A": "1"}),
        ("IgnoreUnknown=1;K8S_POD_NAME=a.b-c", {"IgnoreUnknown": "1", "K8S_POD_NAME": "a.b-c"}),
    ],
)
def test_good_args(text, args):
    assert request(environment={"CNI_ARGS": text}).args == args


@pytest.mark.parametrize("text", ["A", "=1", "A=1=2", "A=1;A=2", "A B=1", "A=1;B"])
def test_bad_args(text):
    with pytest.raises(spec.CniError, match="CNI_ARGS") as caught:
        request(environment={"CNI_ARGS": text})
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("command", "version", "works"),
    [
        (command, version, True)
        for command in ("ADD", "DEL", "CHECK")
        for version in ("0.4.0", "1.0.0", "1.1.0")
    ]
    + [
        ("GC", "1.1.0", True),
        ("STATUS", "1.1.0", True),
        ("GC", "1.0.0", False),
        ("STATUS", "1.0.0", False),
        ("STATUS", "0.4.0", False),
        ("ADD", "0.3.1", False),
        ("ADD", "1.2.0", False),
        ("ADD", "", False),
        ("ADD", "1.0", False),
        ("DEL", "0.3.0", False),
    ],
)
def test_versions(command, version, works):
    config = {"cniVersion": version, "cni.dev/valid-attachments": []}
    if command == "CHECK":
        config["prevResult"] = {"cniVersion": version}
    if works:
        assert request(command, config=config).cni_version == version
        return
    with pytest.raises(spec.CniError, match="cniVersion") as caught:
        request(command, config=config)
    assert caught.value.code == 1


def test_without_a_version_it_is_the_first_one():
    given = spec.parameters(ENVIRONMENT)
    with pytest.raises(spec.CniError) as caught:
        spec.request(given, {"name": "podwall", "type": "podwall"})
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"cniVersion": 1}, "cniVersion"),
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": "a b"}, "name"),
        ({"type": None}, "type"),
        ({"type": ""}, "type"),
        ({"socket": "agent.sock"}, "socket"),
        ({"socket": 7}, "socket"),
        ({"socket": ""}, "socket"),
        ({"socket": "/" + "x" * 107}, "socket"),
        ({"timeoutSeconds": 0}, "timeoutSeconds"),
        ({"timeoutSeconds": "9"}, "timeoutSeconds"),
        ({"timeoutSeconds": True}, "timeoutSeconds"),
        ({"timeoutSeconds": 601}, "timeoutSeconds"),
        ({"prevResult": []}, "prevResult"),
        ({"prevResult": {"cniVersion": "1.1.0"}}, "prevResult"),
        ({"runtimeConfig": []}, "runtimeConfig"),
        ({"runtimeConfig": {"bandwidth": 1}}, "bandwidth"),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": -1}}}, "ingressRate"),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": "1M"}}}, "ingressRate"),
        ({"runtimeConfig": {"bandwidth": {"egressRate": 1.5}}}, "egressRate"),
        ({"runtimeConfig": {"bandwidth": {"egressRate": True}}}, "egressRate"),
        ({"runtimeConfig": {"bandwidth": {"egressRate": 1 << 63}}}, "egressRate"),
        ({"runtimeConfig": {"bandwidth": {"egressRate": 8}}}, "egressBurst"),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": 8, "ingressBurst": 0}}}, "ingressBurst"),
        ({"runtimeConfig": {"portMappings": {}}}, "portMappings"),
        ({"runtimeConfig": {"portMappings": [7]}}, r"portMappings\[0\]"),
        ({"runtimeConfig": {"portMappings": [{"hostPort": 80}]}}, r"\[0\].containerPort"),
        ({"runtimeConfig": {"portMappings": [{"hostPort": 65536, "containerPort": 1}]}}, r"\[0\].hostPort"),
        ({"runtimeConfig": {"portMappings": [{"containerPort": 1, "protocol": "icmp"}]}}, r"\[0\].protocol"),
        ({"runtimeConfig": {"portMappings": [{"containerPort": 1, "hostIP": "localhost"}]}}, r"\[0\].hostIP"),
        ({"runtimeConfig": {"portMappings": [{"containerPort": 1, "hostIP": "1.2.3"}]}}, r"\[0\].hostIP"),
    ],
)
def test_bad_configurations(config, named):
    with pytest.raises(spec.CniError, match=named) as caught:
        request(config=config)
    assert caught.value.code == 7


def test_what_podwall_does_not_know_is_tolerated():
    config = {
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"a": "b"}, "mac": "x"},
        "cni.dev/anything": 1,
        "args": {"labels": {}},
        "prevResult": None,
        "dns": {},
    }
    assert request(config=config).config["args"] == {"labels": {}}


def test_a_bad_capability_does_not_hold_up_del():
    assert request("DEL", config={"runtimeConfig": {"bandwidth": {"ingressRate": -1}}}).command == "DEL"


def test_check_needs_the_result_of_add():
    with pytest.raises(spec.CniError, match="prevResult") as caught:
        request("CHECK")
    assert caught.value.code == 7


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        (None, None),
        ({}, None),
        ({"ingressRate": 0, "egressRate": 0}, None),
        (RATES, spec.Bandwidth(8000, 8, 16000, 16)),
        ({"egressRate": 9, "egressBurst": 1}, spec.Bandwidth(0, 0, 9, 1)),
        # as containerd writes them, with its fixed burst
        (
            {"IngressRate": 1000000, "IngressBurst": 4294967295, "EgressRate": 0, "EgressBurst": 0},
            spec.Bandwidth(1000000, 4294967295, 0, 0),
        ),
    ],
)
def test_bandwidth(given, limits):
    assert spec.bandwidth(request(config={"runtimeConfig": {"bandwidth": given}}).config) == limits


@pytest.mark.parametrize(
    ("given", "mappings"),
    [
        (None, ()),
        ([], ()),
        ([{"hostPort": 8080, "containerPort": 80}], (spec.PortMapping(8080, 80, "tcp", ""),)),
        (
            [{"HostPort": 53, "ContainerPort": 5353, "Protocol": "UDP", "HostIP": "fd00::1"}],
            (spec.PortMapping(53, 5353, "udp", "fd00::1"),),
        ),
        ([{"hostPort": 0, "containerPort": 80, "protocol": "sctp", "hostIP": "10.0.0.1"}], ()),
    ],
)
def test_port_mappings(given, mappings):
    assert spec.port_mappings(request(config={"runtimeConfig": {"portMappings": given}}).config) == mappings


@pytest.mark.parametrize("key", ["cni.dev/valid-attachments", "cni.dev/attachments"])
def test_valid_attachments(key):
    asked = request("GC", config={key: [{"containerID": "a", "ifname": "eth0", "more": 1}]})
    assert spec.valid_attachments(asked.config) == {spec.AttachmentKey("a", "eth0")}


def test_a_go_runtimes_empty_list():
    assert spec.valid_attachments({"cni.dev/valid-attachments": None}) == frozenset()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"cni.dev/valid-attachments": {}},
        {"cni.dev/valid-attachments": ["a"]},
        {"cni.dev/valid-attachments": [{"containerID": "a"}]},
        {"cni.dev/valid-attachments": [{"containerID": "", "ifname": "eth0"}]},
        {"cni.dev/valid-attachments": [{"containerID": 1, "ifname": "eth0"}]},
    ],
)
def test_gc_removes_nothing_without_a_whole_list(config):
    with pytest.raises(spec.CniError, match="attachments") as caught:
        request("GC", config=config)
    assert caught.value.code == 7


@pytest.mark.parametrize(
    ("call", "change"),
    [
        ("cni.VERSION", {}),
        ("cni.NOTHING", {}),
        ("status", {}),
        ("cni.ADD", {"container_id": 7}),
        ("cni.ADD", {"container_id": "../x"}),
        ("cni.ADD", {"netns": ""}),
        ("cni.ADD", {"args": []}),
        ("cni.ADD", {"args": {"A": 1}}),
        ("cni.ADD", {"config": None}),
        ("cni.ADD", {"config": {}}),
    ],
)
def test_the_agent_checks_again(call, change):
    with pytest.raises(spec.CniError):
        spec.from_body(call, request().body() | change)


def test_an_error_object():
    error = spec.CniError(11, "later", "why")
    assert error.to_json("1.0.0") == {"cniVersion": "1.0.0", "code": 11, "msg": "later", "details": "why"}
    assert spec.CniError(7, "x").to_json("0.4.0") == {"cniVersion": "0.4.0", "code": 7, "msg": "x"}
