"""What a container runtime asks of a CNI plugin, checked against the specification before anybody acts on it.

    environment (CNI_COMMAND, ...) --parameters()--+
                                                   +--> Request --body()--> socket --from_body()--> Request
    network configuration (stdin)  --request()-----+

The binary checks, and the agent checks again what came over its socket: neither trusts the other. What is
wrong is told by a CniError with the specification's number and the field's name. Results are in `cni.result`.

Specifications: CNI 0.4.0, 1.0.0 and 1.1.0. This module is pure.
"""

from __future__ import annotations

import _socket
from dataclasses import dataclass

from cni import wire

TYPE_CHECKING = False  # importing `typing` would cost the binary more than the rest of its start
if TYPE_CHECKING:
    from collections.abc import Mapping

VERSIONS = ("0.4.0", "1.0.0", "1.1.0")
LATEST = VERSIONS[-1]

ADD, DEL, CHECK, GC, STATUS, VERSION = COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")

INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
LIMITED_CONNECTIVITY = 51
"""Codes of the specification. Own codes start at 100."""
FAILED = 100
"""The kernel or the agent refused; the message says what."""

SINCE_1_1 = (GC, STATUS)
OF_A_CONTAINER = (ADD, DEL, CHECK)
VALID_ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")
"""The second is what drafts of 1.1.0 called it; libcni sends both."""

_ALPHANUMERIC = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME = _ALPHANUMERIC | frozenset("_.-")
TIMEOUT = 60
STATUS_TIMEOUT = 10
_TIMEOUTS = range(1, 601)
_PATH_MAX = 4096
_SOCKET_PATH_MAX = 107
_IFNAME_MAX = 15
_CONTAINER_ID_MAX = 256
_RATES = range(1 << 63)
_PROTOCOLS = ("tcp", "udp", "sctp")
_BANDWIDTH = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")


class CniError(Exception):
    """What the runtime is told instead of a result: a code, a message and details."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details

    def to_json(self, cni_version: str) -> dict[str, object]:
        """Return the error object of the specification."""
        answer: dict[str, object] = {"cniVersion": cni_version, "code": self.code, "msg": self.msg}
        if self.details:
            answer["details"] = self.details
        return answer


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the environment says. Fields that a command does not use are empty."""

    command: str
    container_id: str
    ifname: str
    netns: str
    args: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """A whole, valid request. `netns` is "" on DEL when the namespace is gone, and for GC and STATUS."""

    command: str
    cni_version: str
    container_id: str
    ifname: str
    netns: str
    args: Mapping[str, str]
    config: Mapping[str, object]

    @property
    def socket(self) -> str:
        """The pathname of the agent's socket."""
        return str(self.config.get("socket", wire.SOCKET))

    @property
    def timeout(self) -> int:
        """How many seconds the agent has to answer."""
        default = STATUS_TIMEOUT if self.command == STATUS else TIMEOUT
        return _number(self.config, "", "timeoutSeconds", _TIMEOUTS, default)

    def body(self) -> dict[str, object]:
        """Return the request as the agent gets it."""
        return {
            "cni_version": self.cni_version,
            "container_id": self.container_id,
            "ifname": self.ifname,
            "netns": self.netns,
            "args": self.args,
            "config": self.config,
        }


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Limits of a link as the Pod sees it: rates in bits per second (0 is unlimited), bursts in bits."""

    ingress_rate: int
    ingress_burst: int
    egress_rate: int
    egress_burst: int


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A port of the node that leads to one of the Pod; `host_ip` "" is every address of the node."""

    host_port: int
    container_port: int
    protocol: str
    host_ip: str


@dataclass(frozen=True, slots=True)
class AttachmentKey:
    """What the specification identifies an attachment by."""

    container_id: str
    ifname: str


def parameters(environment: Mapping[str, str]) -> Parameters:
    """Return the checked parameters of a command. Raises CniError 4 naming every missing or bad variable."""
    command = environment.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND is {command!r}, not one of {known}")
    if command not in OF_A_CONTAINER:
        return Parameters(command, "", "", "", {})
    container_id = environment.get("CNI_CONTAINERID", "")
    ifname = environment.get("CNI_IFNAME", "")
    netns = environment.get("CNI_NETNS", "")
    _check_attachment(command, container_id, ifname, netns)
    return Parameters(command, container_id, ifname, netns, _args(environment.get("CNI_ARGS", "")))


def request(given: Parameters, config: object) -> Request:
    """Return the whole request. Raises CniError 1 or 7 naming the key of the configuration and the remedy."""
    if not isinstance(config, dict):
        raise CniError(INVALID_CONFIG, "the network configuration is not a JSON object")
    version = _version(given.command, config)
    _check_config(given.command, config)
    return Request(given.command, version, given.container_id, given.ifname, given.netns, given.args, config)


def from_body(call: str, body: Mapping[str, object]) -> Request:
    """Return the request that came over the socket, checked just as the binary does. Raises CniError."""
    command = call.removeprefix("cni.")
    container_id, ifname, netns = (_text(body, key) for key in ("container_id", "ifname", "netns"))
    if command not in COMMANDS or command == VERSION:
        raise CniError(INVALID_ENVIRONMENT, f"{call!r} is no call of a CNI command")
    args = body.get("args", {})
    if not isinstance(args, dict) or not all(isinstance(value, str) for value in args.values()):
        raise CniError(INVALID_ENVIRONMENT, "CNI_ARGS is not a mapping of strings")
    if command in OF_A_CONTAINER:
        _check_attachment(command, container_id, ifname, netns)
    return request(Parameters(command, container_id, ifname, netns, args), body.get("config"))


def version_answer(config: object) -> dict[str, object]:
    """Return the answer to VERSION: in the version that was asked in, where we speak it."""
    asked = config.get("cniVersion") if isinstance(config, dict) else None
    return {"cniVersion": asked if asked in VERSIONS else LATEST, "supportedVersions": list(VERSIONS)}


def error_version(config: object) -> str:
    """Return the version for an error object, also when the configuration is what is wrong."""
    asked = config.get("cniVersion") if isinstance(config, dict) else None
    return str(asked) if asked in VERSIONS else LATEST


def bandwidth(config: Mapping[str, object]) -> Bandwidth | None:
    """Return runtimeConfig.bandwidth, None when nothing is limited. Raises CniError 7."""
    given = _runtime_config(config, "bandwidth")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise CniError(INVALID_CONFIG, "runtimeConfig.bandwidth is not an object")
    rates = {name: _number(given, "runtimeConfig.bandwidth", name, _RATES) for name in _BANDWIDTH}
    for way in ("ingress", "egress"):
        if rates[f"{way}Rate"] and not rates[f"{way}Burst"]:
            raise CniError(
                INVALID_CONFIG,
                f"runtimeConfig.bandwidth.{way}Burst must be more than 0 where {way}Rate is set",
            )
    limits = Bandwidth(*(rates[name] for name in _BANDWIDTH))
    return limits if limits.ingress_rate or limits.egress_rate else None


def port_mappings(config: Mapping[str, object]) -> tuple[PortMapping, ...]:
    """Return runtimeConfig.portMappings without those that have no host port. Raises CniError 7."""
    given = _runtime_config(config, "portMappings")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise CniError(INVALID_CONFIG, "runtimeConfig.portMappings is not a list")
    mappings = (_port_mapping(entry, f"runtimeConfig.portMappings[{i}]") for i, entry in enumerate(given))
    return tuple(mapping for mapping in mappings if mapping.host_port)


def valid_attachments(config: Mapping[str, object]) -> frozenset[AttachmentKey]:
    """Return the attachments that GC must keep. Raises CniError 7: without the list nothing is removed."""
    present = [key for key in VALID_ATTACHMENTS if key in config]
    if not present:
        raise CniError(INVALID_CONFIG, f"{VALID_ATTACHMENTS[0]} is missing; GC removes nothing without it")
    key = present[0]
    given = config[key]
    if given is None:  # a Go runtime's empty list
        return frozenset()
    if not isinstance(given, list):
        raise CniError(INVALID_CONFIG, f"{key} is not a list")
    return frozenset(_attachment_key(entry, f"{key}[{i}]") for i, entry in enumerate(given))


def worded_for_delete(text: str) -> str:
    """Return an error text that containerd does not swallow.

    Its go-cni takes a DEL's error for success when the text says "not found" or, without a CNI_NETNS,
    "no such file or directory"; the address and the link would leak.
    """
    return text.replace("not found", "missing").replace("no such file or directory", "missing")


def _check_attachment(command: str, container_id: str, ifname: str, netns: str) -> None:
    problems = [
        problem
        for problem in (
            _container_id_problem(container_id),
            _ifname_problem(ifname),
            _netns_problem(netns, required=command != DEL),
        )
        if problem
    ]
    if problems:
        raise CniError(INVALID_ENVIRONMENT, "; ".join(problems))


def _container_id_problem(container_id: str) -> str:
    if not container_id:
        return "CNI_CONTAINERID is missing"
    if container_id[0] not in _ALPHANUMERIC or not _NAME.issuperset(container_id):
        return f"CNI_CONTAINERID {container_id!r} must be letters, digits, _ . - and not start with _ . -"
    if len(container_id) > _CONTAINER_ID_MAX:
        return f"CNI_CONTAINERID is longer than {_CONTAINER_ID_MAX} characters"
    return ""


def _ifname_problem(ifname: str) -> str:
    if not ifname:
        return "CNI_IFNAME is missing"
    if len(ifname.encode(errors="surrogatepass")) > _IFNAME_MAX:
        return f"CNI_IFNAME {ifname!r} is longer than {_IFNAME_MAX} bytes"
    if ifname in (".", ".."):
        return f"CNI_IFNAME {ifname!r} is no name for an interface"
    if any(character in "/:\0" or character.isspace() for character in ifname):
        return f"CNI_IFNAME {ifname!r} must not hold / : or white space"
    return ""


def _netns_problem(netns: str, *, required: bool) -> str:
    if not netns:
        return "CNI_NETNS is missing" if required else ""
    if netns[0] != "/" or "\0" in netns or len(netns) >= _PATH_MAX:
        return f"CNI_NETNS {netns[:80]!r} is no absolute path"
    return ""


def _args(text: str) -> dict[str, str]:
    args: dict[str, str] = {}
    for pair in text.split(";"):
        if not pair:
            continue
        key, equals, value = pair.partition("=")
        if not equals or not key or "=" in value or not _NAME.issuperset(key):
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS holds {pair!r}, which is not KEY=VALUE")
        if key in args:
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS gives {key} twice")
        args[key] = value
    return args


def _version(command: str, config: Mapping[str, object]) -> str:
    version = config.get("cniVersion", "0.1.0")  # the specification's default
    if not isinstance(version, str):
        raise CniError(INVALID_CONFIG, "cniVersion is not a string")
    if version not in VERSIONS:
        raise CniError(
            INCOMPATIBLE_VERSION,
            f"cniVersion {version!r} is not supported",
            f"set cniVersion in the network configuration to one of {', '.join(VERSIONS)}",
        )
    if command in SINCE_1_1 and version != LATEST:
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion {version!r} has no {command}; it came with 1.1.0")
    return version


def _check_config(command: str, config: Mapping[str, object]) -> None:
    name = config.get("name")
    if not isinstance(name, str) or not name or name[0] not in _ALPHANUMERIC or not _NAME.issuperset(name):
        raise CniError(INVALID_CONFIG, "name must be letters, digits, _ . - and not start with _ . -")
    kind = config.get("type")
    if not isinstance(kind, str) or not kind:
        raise CniError(INVALID_CONFIG, "type must be the name of the plugin's executable")
    _check_socket(config.get("socket", wire.SOCKET))
    _number(config, "", "timeoutSeconds", _TIMEOUTS, TIMEOUT)
    previous = config.get("prevResult")
    if previous is not None and not isinstance(previous, dict):
        raise CniError(INVALID_CONFIG, "prevResult is not an object")
    if command == ADD and previous:
        raise CniError(INVALID_CONFIG, "prevResult is given: podwall must come first in the list of plugins")
    if command == CHECK and not previous:
        raise CniError(INVALID_CONFIG, "prevResult is missing: CHECK needs the result of ADD")
    if command in (ADD, CHECK):  # a DEL must never fail for what it does not need
        bandwidth(config)
        port_mappings(config)
    if command == GC:
        valid_attachments(config)


def _check_socket(path: object) -> None:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise CniError(INVALID_CONFIG, "socket must be the absolute path of the agent's socket")
    if len(path.encode(errors="surrogatepass")) > _SOCKET_PATH_MAX:
        raise CniError(INVALID_CONFIG, f"socket is longer than {_SOCKET_PATH_MAX} bytes")


def _runtime_config(config: Mapping[str, object], capability: str) -> object:
    given = config.get("runtimeConfig")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise CniError(INVALID_CONFIG, "runtimeConfig is not an object")
    return given.get(capability)


def _port_mapping(entry: object, where: str) -> PortMapping:
    if not isinstance(entry, dict):
        raise CniError(INVALID_CONFIG, f"{where} is not an object")
    protocol = _field(entry, "protocol", "tcp") or "tcp"
    if not isinstance(protocol, str) or protocol.lower() not in _PROTOCOLS:
        raise CniError(INVALID_CONFIG, f"{where}.protocol must be one of {', '.join(_PROTOCOLS)}")
    host_ip = _field(entry, "hostIP", "")
    if not isinstance(host_ip, str) or (host_ip and not _is_address(host_ip)):
        raise CniError(INVALID_CONFIG, f"{where}.hostIP must be an IP address")
    return PortMapping(
        _number(entry, where, "hostPort", range(65536)),
        _number(entry, where, "containerPort", range(1, 65536)),
        protocol.lower(),
        host_ip,
    )


def _attachment_key(entry: object, where: str) -> AttachmentKey:
    if not isinstance(entry, dict):
        raise CniError(INVALID_CONFIG, f"{where} is not an object")
    container_id, ifname = entry.get("containerID"), entry.get("ifname")
    if not isinstance(container_id, str) or not isinstance(ifname, str) or not container_id or not ifname:
        raise CniError(INVALID_CONFIG, f"{where} must hold containerID and ifname")
    return AttachmentKey(container_id, ifname)


def _field(entry: Mapping[str, object], name: str, default: object) -> object:
    """Return a field of a capability; containerd writes its name with a capital letter."""
    return entry.get(name, entry.get(name[0].upper() + name[1:], default))


def _number(entry: Mapping[str, object], where: str, name: str, allowed: range, default: int = 0) -> int:
    value = _field(entry, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        path = f"{where}.{name}".removeprefix(".")
        raise CniError(INVALID_CONFIG, f"{path} must be a whole number from {allowed[0]} to {allowed[-1]}")
    return value


def _is_address(text: str) -> bool:
    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return True
    return False


def _text(body: Mapping[str, object], key: str) -> str:
    value = body.get(key, "")
    if not isinstance(value, str):
        raise CniError(INVALID_ENVIRONMENT, f"{key} is not a string")
    return value
