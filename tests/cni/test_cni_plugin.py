"""The plugin from the outside: what it asks the agent, what it prints, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cni import wire

RESULT = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "eth0", "mac": "0a:58:0a:f4:00:05", "mtu": 1500, "sandbox": "/run/netns/blue"}],
    "ips": [{"address": "10.244.0.5/32", "interface": 0, "gateway": "169.254.1.1"}],
}


def identity(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0", "1.1.0"])
def test_add_hands_the_namespace_over_and_prints_the_result(plugin, stand_in, netns, version):
    stand_in.answer(wire.Answer(RESULT | {"cniVersion": version}))
    outcome = plugin.run("ADD", {"cniVersion": version}, CNI_NETNS=netns)
    assert (outcome.status, outcome.json) == (0, RESULT | {"cniVersion": version})
    assert stand_in.namespaces == [identity(netns)]
    (request,) = stand_in.requests
    assert request.call == "cni.ADD"
    assert request.body == {
        "cni_version": version,
        "container_id": "3f6940ab5ab43bc522569d15b23f8c1b",
        "ifname": "eth0",
        "netns": netns,
        "args": {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": "default",
            "K8S_POD_NAME": "web-0",
            "K8S_POD_INFRA_CONTAINER_ID": "3f6940ab5ab43bc522569d15b23f8c1b",
            "K8S_POD_UID": "5b1c",
        },
        "config": {
            "cniVersion": version,
            "name": "podwall",
            "type": "podwall",
            "capabilities": {"bandwidth": True, "portMappings": True},
            "socket": plugin.socket,
        },
    }


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("DEL", {}),
        ("CHECK", {"prevResult": RESULT}),
        ("GC", {"cni.dev/valid-attachments": []}),
        ("STATUS", {}),
    ],
)
def test_other_commands_print_nothing(plugin, stand_in, netns, verb, config):
    outcome = plugin.run(verb, config, CNI_NETNS=netns)
    assert (outcome.status, outcome.text) == (0, "")
    assert [request.call for request in stand_in.requests] == [f"cni.{verb}"]
    assert stand_in.namespaces == ([identity(netns)] if verb in ("DEL", "CHECK") else [])


def test_gc_passes_the_valid_attachments_on(plugin, stand_in):
    valid = [{"containerID": "3f69", "ifname": "eth0"}, {"containerID": "77ab", "ifname": "net1"}]
    outcome = plugin.run("GC", {"cni.dev/valid-attachments": valid}, CNI_CONTAINERID=None, CNI_IFNAME=None)
    assert (outcome.status, outcome.text) == (0, "")
    assert stand_in.requests[0].body["config"]["cni.dev/valid-attachments"] == valid


@pytest.mark.parametrize("gone", ["", "/run/netns/podwall-gone", "/proc/1/does-not-exist", "/etc/hostname"])
def test_del_reaches_the_agent_without_a_namespace(plugin, stand_in, gone):
    outcome = plugin.run("DEL", CNI_NETNS=gone)
    assert (outcome.status, outcome.text) == (0, "")
    assert stand_in.requests[0].body["netns"] == ""
    assert stand_in.namespaces == []


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b'{"cniVersion": "1.0.0"}', "1.0.0"),
        (b'{"cniVersion": "0.4.0", "name": "x"}', "0.4.0"),
        (b'{"cniVersion": "0.3.1"}', "1.1.0"),
        (b"", "1.1.0"),
        (b"no JSON", "1.1.0"),
        (b"[]", "1.1.0"),
    ],
)
def test_version_is_answered_without_the_agent(plugin, stdin, version):
    outcome = plugin.run("VERSION", stdin=stdin, CNI_CONTAINERID=None, CNI_IFNAME=None)
    assert outcome.status == 0
    assert outcome.json == {"cniVersion": version, "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}


def test_an_error_of_the_agent_is_passed_on(plugin, stand_in, netns):
    stand_in.answer(wire.Failure(11, "no address is free", "podCIDR 10.244.1.0/24 holds 254"))
    outcome = plugin.run("ADD", {"cniVersion": "0.4.0"}, CNI_NETNS=netns)
    assert outcome.status == 1
    assert outcome.json == {
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "no address is free",
        "details": "podCIDR 10.244.1.0/24 holds 254",
    }


@pytest.mark.parametrize("code", [50, 51])
def test_status_passes_the_agents_reason_on(plugin, stand_in, code):
    stand_in.answer(wire.Failure(code, "the Node has no podCIDR"))
    outcome = plugin.run("STATUS")
    assert (outcome.status, outcome.json["code"]) == (1, code)


@pytest.mark.parametrize(
    ("verb", "config", "code"),
    [
        ("ADD", {}, 11),
        ("DEL", {}, 11),
        ("CHECK", {"prevResult": RESULT}, 11),
        ("GC", {"cni.dev/valid-attachments": []}, 11),
        ("STATUS", {}, 50),
    ],
)
@pytest.mark.parametrize("socket", ["no such file", "not a socket", "nobody listens", "no such directory"])
def test_without_an_agent(frozen_plugin, netns, verb, config, code, socket):  # noqa: PLR0917
    path = Path(frozen_plugin.socket)
    if socket == "not a socket":
        path.touch()
    elif socket == "nobody listens":
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])",
                path,
            ],
            check=True,
        )
    elif socket == "no such directory":
        path = path.parent / "missing" / "agent.sock"
    outcome = frozen_plugin.run(verb, config | {"socket": str(path)}, CNI_NETNS=netns)
    assert outcome.status == 1
    assert outcome.json["code"] == code
    assert outcome.json["cniVersion"] == "1.1.0"
    assert str(path) in outcome.json["msg"]
    assert "not found" not in outcome.text
    assert "no such file or directory" not in outcome.text.lower()


@pytest.mark.parametrize("text", ["link podwall1 not found", "open netns: no such file or directory"])
def test_del_never_says_what_containerd_swallows(plugin, stand_in, text):
    stand_in.answer(wire.Failure(100, text, text))
    outcome = plugin.run("DEL")
    assert (outcome.status, outcome.json["code"]) == (1, 100)
    assert "not found" not in outcome.text
    assert "no such file or directory" not in outcome.text


def closes(connection, _):
    connection.close()


def half_an_answer(connection, _):
    connection.sendall(wire.Answer(RESULT).encode()[:40])


def header_only(connection, _):
    connection.sendall((100).to_bytes(4, "big"))


def too_long(connection, _):
    connection.sendall((wire.LIMIT + 1).to_bytes(4, "big") + b"x" * 1000)


def no_json(connection, _):
    connection.sendall((4).to_bytes(4, "big") + b"{{{{")


def not_utf8(connection, _):
    connection.sendall((4).to_bytes(4, "big") + b"\xff\xfe\xfd\xfc")


def two_answers(connection, _):
    connection.sendall(wire.Answer(RESULT).encode() * 2)


def wrong_version(connection, _):
    connection.sendall(wire.Answer(RESULT | {"cniVersion": "1.0.0"}).encode())


def no_result(connection, _):
    connection.sendall(wire.Answer(None).encode())


def error_without_code(connection, _):
    connection.sendall(wire.frame({"error": {"msg": "x"}}))


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (closes, 11),
        (half_an_answer, 11),
        (header_only, 11),
        (too_long, 100),
        (no_json, 100),
        (not_utf8, 100),
        (two_answers, 100),
        (wrong_version, 100),
        (no_result, 100),
        (error_without_code, 100),
    ],
)
def test_an_agent_that_answers_badly(plugin, stand_in, netns, behaviour, code):
    stand_in.behave = behaviour
    outcome = plugin.run("ADD", CNI_NETNS=netns)
    assert (outcome.status, outcome.json["code"]) == (1, code)


@pytest.mark.parametrize("behaviour", [closes, half_an_answer, too_long, no_json])
def test_status_of_an_agent_that_answers_badly(frozen_plugin, stand_in, behaviour):
    stand_in.behave = behaviour
    outcome = frozen_plugin.run("STATUS")
    assert (outcome.status, outcome.json["code"]) == (1, 50)


def test_an_agent_that_never_answers(plugin, stand_in, netns):
    stand_in.behave = lambda *_: stand_in.stopped.wait(5)
    started = time.monotonic()
    outcome = plugin.run("ADD", {"timeoutSeconds": 1}, CNI_NETNS=netns)
    assert (outcome.status, outcome.json["code"]) == (1, 11)
    assert "within 1 s" in outcome.json["msg"]
    assert 0.9 < time.monotonic() - started < 4


def test_an_agent_that_answers_a_byte_at_a_time_meets_the_same_limit(frozen_plugin, stand_in, netns):
    def drip(connection, _):
        for byte in wire.Answer(RESULT).encode():
            connection.sendall(bytes([byte]))
            if stand_in.stopped.wait(0.05):
                return

    stand_in.behave = drip
    started = time.monotonic()
    outcome = frozen_plugin.run("ADD", {"timeoutSeconds": 1}, CNI_NETNS=netns)
    assert (outcome.status, outcome.json["code"]) == (1, 11)
    assert time.monotonic() - started < 4


def test_an_agent_with_a_full_backlog(frozen_plugin, tmp_path, netns):
    script = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(0)\n"
        "c=socket.socket(socket.AF_UNIX); c.connect(sys.argv[1])\n"
        "print('full', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, frozen_plugin.socket]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        assert agent.stdout.readline() == b"full\n"
        outcome = frozen_plugin.run("ADD", {"timeoutSeconds": 1}, CNI_NETNS=netns)
        agent.stdin.close()
    assert (outcome.status, outcome.json["code"]) == (1, 11)


@pytest.mark.parametrize("verb", ["ADD", "DEL", "STATUS"])
def test_an_agent_killed_in_the_middle_of_its_answer(frozen_plugin, netns, verb):
    script = (
        "import os,socket,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "print('listens', flush=True)\n"
        "c,_=s.accept(); c.recv(65536); c.sendall(bytes.fromhex(sys.argv[2]))\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    half = wire.Answer(RESULT).encode()[:30].hex()
    command = [sys.executable, "-c", script, frozen_plugin.socket, half]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        assert agent.stdout.readline() == b"listens\n"
        outcome = frozen_plugin.run(verb, CNI_NETNS=netns)
        assert agent.wait(timeout=10) == -signal.SIGKILL
    assert (outcome.status, outcome.json["code"]) == (1, 50 if verb == "STATUS" else 11)


def test_an_agent_that_refuses_before_it_has_read_all(frozen_plugin, tmp_path, netns):
    script = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "print('listens', flush=True)\n"
        "c,_=s.accept(); c.sendall(bytes.fromhex(sys.argv[2]))\n"
        "c.shutdown(socket.SHUT_RD); sys.stdin.read()\n"
    )
    refusal = wire.Failure(100, "only root may ask").encode().hex()
    command = [sys.executable, "-c", script, frozen_plugin.socket, refusal]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        assert agent.stdout.readline() == b"listens\n"
        outcome = frozen_plugin.run("ADD", {"padding": "x" * 900_000}, CNI_NETNS=netns)
        agent.stdin.close()
    assert outcome.json["msg"] == "only root may ask"


def test_a_long_configuration_arrives_whole(plugin, stand_in, netns):
    stand_in.answer(wire.Answer(RESULT))
    padding = '\u00e4\n"\\\U0001f600' * 30_000
    outcome = plugin.run("ADD", {"padding": padding}, CNI_NETNS=netns)
    assert outcome.status == 0
    assert stand_in.requests[0].body["config"]["padding"] == padding
    assert stand_in.namespaces == [identity(netns)]


@pytest.mark.parametrize(
    ("stdin", "code"),
    [
        (b"", 6),
        (b"{", 6),
        (b'{"cniVersion": "1.1.0"', 6),
        (b'"\xff"', 6),
        (b"[" * 100_000, 6),
        (b"[]", 7),
        (b"7", 7),
        (b" " * (wire.LIMIT + 1), 5),
    ],
)
def test_a_bad_configuration_on_stdin(plugin, netns, stdin, code):
    outcome = plugin.run("ADD", stdin=stdin, CNI_NETNS=netns)
    assert (outcome.status, outcome.json["code"]) == (1, code)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"CNI_CONTAINERID": None}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "../x"}, "CNI_CONTAINERID"),
        ({"CNI_IFNAME": None}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "eth0/1"}, "CNI_IFNAME"),
        ({"CNI_NETNS": None}, "CNI_NETNS"),
        ({"CNI_NETNS": "relative"}, "CNI_NETNS"),
        ({"CNI_NETNS": "/run/netns/podwall-gone"}, "CNI_NETNS"),
        ({"CNI_NETNS": "/etc/hostname"}, "CNI_NETNS"),
        ({"CNI_NETNS": "/proc/self/ns/mnt"}, "CNI_NETNS"),
        ({"CNI_NETNS": "/proc/self/ns/net"}, "CNI_NETNS"),
        ({"CNI_ARGS": "K8S_POD_NAME"}, "CNI_ARGS"),
        ({"CNI_COMMAND": "add"}, "CNI_COMMAND"),
        ({"CNI_COMMAND": None}, "CNI_COMMAND"),
    ],
)
def test_a_bad_environment_never_reaches_the_agent(plugin, stand_in, netns, variables, named):
    outcome = plugin.run("ADD", **({"CNI_NETNS": netns} | variables))
    assert (outcome.status, outcome.json["code"]) == (1, 4)
    assert named in outcome.json["msg"]
    assert stand_in.requests == []


def test_a_fifo_as_namespace_does_not_hold_the_plugin(frozen_plugin, stand_in, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    outcome = frozen_plugin.run("ADD", CNI_NETNS=str(tmp_path / "fifo"))
    assert (outcome.status, outcome.json["code"]) == (1, 4)


def test_a_variable_that_is_not_utf8(frozen_plugin):
    environment = {b"CNI_COMMAND": b"DEL", b"CNI_CONTAINERID": b"\xff\xfe", b"CNI_IFNAME": b"eth0"}
    done = subprocess.run(
        frozen_plugin.command, input=b"{}", env=environment, capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 4
    assert "CNI_CONTAINERID" in json.loads(done.stdout)["msg"]


def test_a_closed_stdin(frozen_plugin, netns):
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" <&-', *frozen_plugin.command],
        env={"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a", "CNI_IFNAME": "eth0", "CNI_NETNS": netns},
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 5
