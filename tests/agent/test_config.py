"""The configuration: where values come from, and what an unusable one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.config import SETTINGS, ConfigError, load


def test_the_nearest_place_wins(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("node_name: from-file\nmode: direct\nvxlan_port: 1\nmtu: 1400\n")
    config = load(
        ["--config", str(file), "--vxlan-port", "3"],
        {"PODWALL_VXLAN_PORT": "2", "PODWALL_MODE": "vxlan", "PATH": "/bin"},
    )
    assert (config.node_name, config.mode, config.vxlan_port, config.mtu) == ("from-file", "vxlan", 3, 1400)


def test_an_empty_file_is_a_file_without_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("")
    assert load(["--config", str(file), "--node-name", "a"], {}).mode == "auto"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("node_name", "Node_1", "the name of a Node"),
        ("cluster", "manifests:relative", "manifests:DIRECTORY"),
        ("mode", "ipip", "one of auto, direct, vxlan"),
        ("mtu", "-1", "a whole number from 0 to 65535"),
        ("mtu", "1500 ", "a whole number"),
        ("vxlan_id", "16777216", "from 1 to 16777215"),
        ("masquerade", "maybe", "true or false"),
        ("socket", "run/agent.sock", "an absolute path"),
        ("http_address", "localhost:80", "ADDRESS:PORT"),
        ("http_address", "127.0.0.1:0", "ADDRESS:PORT"),
        ("api_server", "10.0.0.1:6443", "a URL"),
        ("services", "maybe", "one of auto, on, off"),
        ("external_ips", "10.0.0.1/8", "10.0.0.1/8 has host bits set"),
        ("node_port_addresses", "eth0", "CIDRs such as"),
        ("log_level", "verbose", "one of debug, info"),
        ("address_rest_s", "nan", "seconds from 0"),
        ("add_timeout_s", "0", "seconds from 0.1"),
    ],
)
def test_a_bad_value_names_its_setting_its_place_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    variable = f"PODWALL_{name.upper()}"
    environment = {"PODWALL_NODE_NAME": "node", variable: value}
    with pytest.raises(ConfigError, match=re.escape(allowed)) as caught:
        load([], environment)
    assert variable in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("content", ["mod: auto\n", "- mode\n", "mode: [\n", "mode: {a: b}\n", "mtu: true\n"])
def test_a_bad_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load(["--config", str(file), "--node-name", "a"], {})


@pytest.mark.parametrize(
    ("written", "read"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on"), ("true", "on")]
)
def test_services_as_yaml_writes_it(tmp_path: Path, written: str, read: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"services: {written}\n")
    assert load(["--config", str(file), "--node-name", "a"], {}).services == read


def test_networks_as_a_list_or_in_one_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("external_ips: [192.0.2.0/24, 'fd00::/64']\n")
    config = load(
        [
            "--config",
            str(file),
            "--node-name",
            "a",
            "--node-port-addresses",
            "fd00::/64, 192.0.2.0/24,192.0.2.7/32",
        ],
        {},
    )
    assert config.external_ips == config.node_port_addresses
    assert [str(each) for each in config.external_ips] == ["192.0.2.0/24", "fd00::/64"]


def test_the_node_name_is_required() -> None:
    with pytest.raises(ConfigError, match="PODWALL_NODE_NAME"):
        load([], {})


def test_every_default_is_a_value_that_would_be_accepted() -> None:
    for name, setting in SETTINGS.items():
        if name != "node_name":
            assert setting.metadata["parse"](setting.default) == setting.default


def test_the_reference_lists_every_setting() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", reference, re.MULTILINE))
    assert rows == {name: setting.metadata["description"] for name, setting in SETTINGS.items()}
