"""The agent's configuration: one frozen value, parsed and checked once.

Each setting is a field of `Config`. Its value is taken from the first place that names it:

    a flag           --vxlan-port 4789
    the environment  PODWALL_VXLAN_PORT=4789
    the file         vxlan_port: 4789            (YAML, --config FILE)
    the default      the field's own

A name nobody knows, or a value that does not fit, ends the start with a sentence that names the setting, the
place it came from and what is allowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from agent.loadbalancer.pools import Pool, parse_pools

ENVIRONMENT_PREFIX = "PODWALL_"

Mode: TypeAlias = Literal["auto", "direct", "vxlan"]
ServicesMode: TypeAlias = Literal["auto", "on", "off"]
IPNetwork: TypeAlias = IPv4Network | IPv6Network

_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class ConfigError(Exception):
    """A setting is unknown or its value is not allowed; the message says which, where, and what is."""


def _node_name(value: object) -> str:
    if not isinstance(value, str) or not _NODE_NAME.fullmatch(value):
        raise ValueError("the name of a Node: lower case letters, digits, '-' and '.'")
    return value


def _path(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value).startswith("/") or "\0" in str(value):
        raise ValueError("an absolute path")
    return Path(value)


def _optional_path(value: object) -> Path | None:
    return None if value in ("", None) else _path(value)


def _boolean(value: object) -> bool:
    words = {
        "true": True,
        "on": True,
        "yes": True,
        "1": True,
        "false": False,
        "off": False,
        "no": False,
        "0": False,
    }
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("true or false")


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        allowed = f"a whole number from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(allowed)
        if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,10}", value):
            raise ValueError(allowed)
        if not low <= int(value) <= high:
            raise ValueError(allowed)
        return int(value)

    return parse


def _seconds(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        allowed = f"seconds from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(allowed)
        try:
            number = float(value)
        except ValueError:
            raise ValueError(allowed) from None
        if not low <= number <= high:
            raise ValueError(allowed)
        return number

    return parse


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError("one of " + ", ".join(words))
        return str(value)

    return parse


def _cluster(value: object) -> str:
    if value == "api":
        return "api"
    if isinstance(value, str) and value.startswith("manifests:/"):
        return value
    raise ValueError("api, or manifests:DIRECTORY with an absolute path")


def _services(value: object) -> str:
    words: dict[object, str] = {True: "on", False: "off"}  # how YAML reads on and off
    return _one_of("auto", "on", "off")(words.get(value, value) if isinstance(value, bool) else value)


def _networks(value: object) -> tuple[IPNetwork, ...]:
    allowed = "CIDRs such as 192.0.2.0/24, fd00::/64: a list, or one text with commas"
    texts = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise ValueError(allowed)
    try:
        networks = [ip_network(str(text)) for text in texts]
        of_4 = [each for each in networks if isinstance(each, IPv4Network)]
        of_6 = [each for each in networks if isinstance(each, IPv6Network)]
        return (*collapse_addresses(of_4), *collapse_addresses(of_6))  # no two may overlap in a set
    except ValueError as error:
        raise ValueError(f"{allowed} ({error})") from None


def _api_server(value: object) -> str:
    if isinstance(value, str) and (value == "auto" or re.fullmatch(r"https?://[^\s/]+", value)):
        return value
    raise ValueError("auto, or a URL such as https://10.0.0.1:6443")


def _http_address(value: object) -> str:
    allowed = "ADDRESS:PORT such as 127.0.0.1:9619 or [::1]:9619, or nothing for none"
    if value == "":
        return ""
    if not isinstance(value, str) or ":" not in value:
        raise ValueError(allowed)
    host, _, port = value.rpartition(":")
    try:
        ip_address(host.removeprefix("[").removesuffix("]"))
        _integer(1, 65535)(port)
    except ValueError:
        raise ValueError(allowed) from None
    return value


def _setting(default: Any, parse: Callable[[object], Any], description: str) -> Any:
    return field(default=default, metadata={"parse": parse, "description": description})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the agent can be told; each field says what it means in its own description."""

    node_name: str = _setting("", _node_name, "the Node this agent serves (required)")
    cluster: str = _setting("api", _cluster, "where objects come from: api, or manifests:DIRECTORY")
    kubeconfig: Path | None = _setting(None, _optional_path, "credentials for the API server; in a Pod: none")
    api_server: str = _setting(
        "auto",
        _api_server,
        "the API server's URL; auto: kubeconfig, then kubelet_kubeconfig, then the environment",
    )
    kubelet_kubeconfig: Path = _setting(
        Path("/etc/kubernetes/kubelet.conf"), _path, "where auto finds the API server's address at boot"
    )
    socket: Path = _setting(
        Path("/run/podwall/agent.sock"), _path, "the socket for the CNI binary and the command"
    )
    state_dir: Path = _setting(Path("/var/lib/podwall"), _path, "where the ledger lies")
    sysctl_dir: Path = _setting(
        Path("/proc/sys"),
        _path,
        "where the kernel's settings can be written; a container sees its own read-only",
    )
    cni_conf_dir: Path = _setting(Path("/etc/cni/net.d"), _path, "where the runtime looks for its network")
    mode: Mode = _setting(
        "auto",
        _one_of("auto", "direct", "vxlan"),
        "how Pods reach other nodes; auto: direct on a shared link",
    )
    mtu: int = _setting(0, _integer(0, 65535), "the Pods' MTU in bytes; 0: from the uplink")
    vxlan_port: int = _setting(4789, _integer(1, 65535), "UDP port between nodes")
    vxlan_id: int = _setting(9619, _integer(1, 16777215), "VXLAN network identifier")
    masquerade: bool = _setting(True, _boolean, "whether Pods leave the cluster with their node's address")
    services: ServicesMode = _setting(
        "auto", _services, "whether podwall serves Services; auto: unless kube-proxy's rules are on the node"
    )
    external_ips: tuple[IPNetwork, ...] = _setting(
        (), _networks, "CIDRs in which a Service's spec.externalIPs are served; none: nowhere"
    )
    node_port_addresses: tuple[IPNetwork, ...] = _setting(
        (), _networks, "CIDRs of the node's addresses that answer NodePorts; none: all but loopback"
    )
    http_address: str = _setting("127.0.0.1:9619", _http_address, "for /healthz, /readyz and /metrics")
    log_level: str = _setting(
        "info", _one_of("debug", "info", "warning", "error"), "the least that is logged"
    )
    address_rest_s: float = _setting(30.0, _seconds(0, 86400), "how long a freed address rests")
    add_timeout_s: float = _setting(20.0, _seconds(0.1, 300), "how long a Pod may wait for its rules")
    load_balancer_pools: tuple[Pool, ...] = _setting(
        (), parse_pools, "addresses for Services of type LoadBalancer, see loadbalancer.md; on a flag as JSON"
    )


SETTINGS = {setting.name: setting for setting in dataclasses.fields(Config)}


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Read flags, environment and file into one Config.

    Raises ConfigError for a name or value that cannot be used. Flags argparse refuses end the program with 2.
    """
    flags = vars(_parser().parse_args(arguments))
    path = flags.pop("config") or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    values = _from_file(Path(path)) if path else {}
    values |= _from_environment(environment)
    values |= {
        name: ("--" + name.replace("_", "-"), value) for name, value in flags.items() if value is not None
    }
    if "node_name" not in values:
        raise ConfigError("node_name is required: --node-name, PODWALL_NODE_NAME, or node_name in the file")
    return Config(**{name: _parse(name, place, value) for name, (place, value) in values.items()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="podwall-agent", description="podwall's node agent", allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with settings by these names, '_' for '-'"
    )
    for name, setting in SETTINGS.items():
        default = "" if setting.default in ("", None, ()) else f" (default: {setting.default})"
        parser.add_argument(
            "--" + name.replace("_", "-"), metavar="VALUE", help=setting.metadata["description"] + default
        )
    return parser


def _from_file(path: Path) -> dict[str, tuple[str, object]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {path} must hold settings as 'name: value' lines")
    for name in content:
        if name not in SETTINGS:
            raise ConfigError(f"{path}: unknown setting {name!r}; known are: {', '.join(SETTINGS)}")
    return {name: (str(path), value) for name, value in content.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, object]]:
    names = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in SETTINGS}
    return {names[key]: (key, value) for key, value in environment.items() if key in names}


def _parse(name: str, place: str, value: object) -> Any:
    try:
        return SETTINGS[name].metadata["parse"](value)
    except ValueError as error:
        raise ConfigError(f"{place}: {name} is {value!r}, but must be {error}") from None
