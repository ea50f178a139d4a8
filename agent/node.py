"""What the node must be before Pods are put on it: kernel settings, and the network's file for the runtime.

    /proc/sys --read--> missing(...) --write--> what cannot be written is reported with the command for it
    conflist(...) --temporary file, fsync, rename--> /etc/cni/net.d/10-podwall.conflist        (last of all)

The runtime starts Pods as soon as the conflist is there, so it is written when the datapath works and removed
first when podwall is uninstalled. It is not removed when the agent ends: without it the node would lose its
network on each restart.

Which settings, and why:

    net.ipv4.ip_forward = 1, net.ipv4.conf.default.forwarding = 1, net.ipv4.conf.UPLINK.forwarding = 1
        A Pod's packets are routed. A link made later takes its setting from `default`, and the uplink may
        have its own.
    net.ipv6.conf.all.forwarding = 1
        The same; IPv6 forwards on all interfaces or on none.
    net.ipv6.conf.UPLINK.accept_ra = 2, only where it is 1 and forwarding is still off
        A host that forwards forgets the default route that a router advertised, and the node would lose its
        IPv6.
    net.ipv4.conf.UPLINK.rp_filter = 2 where the larger of `all` and its own is 1, only with tunnels
        While a peer changes from direct to tunnel, its Pods' packets come by the uplink but are routed over
        the tunnel; the strict check would drop them. Loose still refuses sources without any route. Pods' own
        sources are checked by nftables in any case.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.routes.plan import Mode

CONFLIST = "10-podwall.conflist"
NETWORK = "podwall"
# containerd 1.6 and 1.7 know CNI 1.0.0 and read `cniVersion` alone; newer ones take the highest they know.
CNI_VERSION = "1.0.0"
CNI_VERSIONS = ("0.4.0", "1.0.0", "1.1.0")

_IP_FORWARD = "net/ipv4/ip_forward"
_FORWARDING6 = "net/ipv6/conf/all/forwarding"


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A kernel setting that needs another value, and why; `path` is below /proc/sys."""

    path: str
    value: str
    why: str

    @property
    def name(self) -> str:
        """As sysctl(8) takes it: with slashes where an interface has a dot in its name."""
        return self.path if "." in self.path else self.path.replace("/", ".")

    @property
    def command(self) -> str:
        return f"sysctl -w {self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class SysctlProblem:
    """A setting that could not be made as it must be."""

    sysctl: Sysctl
    found: str | None
    reason: str

    def __str__(self) -> str:
        needed = f"must be {self.sysctl.value} ({self.sysctl.why})"
        if self.found is None:
            return (
                f"{self.sysctl.name} {needed}, but this kernel has no IPv6: start it without ipv6.disable=1"
            )
        return f"{self.sysctl.name} is {self.found} and {needed}: {self.reason}; run {self.sysctl.command}"


def relevant(uplink: str) -> tuple[str, ...]:
    """The settings that `missing` looks at."""
    return (
        _IP_FORWARD,
        "net/ipv4/conf/default/forwarding",
        f"net/ipv4/conf/{uplink}/forwarding",
        "net/ipv4/conf/all/rp_filter",
        f"net/ipv4/conf/{uplink}/rp_filter",
        _FORWARDING6,
        f"net/ipv6/conf/{uplink}/accept_ra",
    )


def missing(
    uplink: str, mode: Mode, families: Iterable[int], current: Mapping[str, str]
) -> tuple[Sysctl, ...]:
    """The settings to change, in order, for Pods of these families; `current` has those the kernel has."""
    families = set(families)
    changes: list[Sysctl] = []
    if 4 in families:
        changes += _forwarding(uplink, current)
        changes += _loose(uplink, mode, current)
    if 6 in families and current.get(_FORWARDING6) != "1":
        accept_ra = f"net/ipv6/conf/{uplink}/accept_ra"
        if current.get(accept_ra) == "1":
            why = "a node that forwards would forget the default route its router advertises"
            changes.append(Sysctl(accept_ra, "2", why))
        changes.append(Sysctl(_FORWARDING6, "1", "Pods' IPv6 packets are routed"))
    return tuple(changes)


def _forwarding(uplink: str, current: Mapping[str, str]) -> Iterator[Sysctl]:
    # Writing ip_forward sets all the others, so it comes first, alone.
    if current.get(_IP_FORWARD) != "1":
        yield Sysctl(_IP_FORWARD, "1", "Pods' packets are routed")
        return
    for name, why in (("default", "links of Pods to come take it"), (uplink, "Pods' packets come in by it")):
        path = f"net/ipv4/conf/{name}/forwarding"
        if current.get(path) != "1":
            yield Sysctl(path, "1", why)


def _loose(uplink: str, mode: Mode, current: Mapping[str, str]) -> Iterator[Sysctl]:
    path = f"net/ipv4/conf/{uplink}/rp_filter"
    strictest = max(current.get("net/ipv4/conf/all/rp_filter", "0"), current.get(path, "0"))
    if mode != "direct" and strictest == "1":
        yield Sysctl(path, "2", "a peer that changes to the tunnel sends the last packets past it")


def conflist(socket: Path) -> bytes:
    """The network's configuration for the runtime, one plugin that asks the agent on this socket."""
    plugin = {
        "type": "podwall",
        "socket": str(socket),
        "capabilities": {"bandwidth": True, "portMappings": True},
    }
    document = {
        "cniVersion": CNI_VERSION,
        "cniVersions": list(CNI_VERSIONS),
        "name": NETWORK,
        "plugins": [plugin],
    }
    return json.dumps(document, indent=2).encode() + b"\n"


# Reading and writing


def settle(
    uplink: str, mode: Mode, families: Iterable[int], root: Path = Path("/proc/sys")
) -> tuple[tuple[Sysctl, ...], tuple[SysctlProblem, ...]]:
    """Make the kernel's settings as podwall needs them; return what was changed, and what could not be."""
    families = tuple(families)
    current = current_settings(uplink, root)
    done: list[Sysctl] = []
    problems: list[SysctlProblem] = []
    for sysctl in missing(uplink, mode, families, current):
        reason = _write(root / sysctl.path, sysctl.value)
        if reason:
            problems.append(SysctlProblem(sysctl, current.get(sysctl.path), reason))
        else:
            done.append(sysctl)
    return tuple(done), tuple(problems)


def current_settings(uplink: str, root: Path) -> dict[str, str]:
    """The settings that `missing` looks at, as far as this kernel has them."""
    return {path: value for path in relevant(uplink) if (value := read(root / path)) is not None}


def read(path: Path) -> str | None:
    """The one line of a setting; None where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _write(path: Path, value: str) -> str:
    """Write a setting and read it back; return why it is not as written, or nothing."""
    try:
        path.write_text(value)
    except FileNotFoundError:
        return "there is no such setting"
    except OSError as error:
        return "/proc/sys is mounted read-only" if error.errno == errno.EROFS else str(error.strerror)
    found = read(path)
    return "" if found == value else f"the kernel keeps {found}"


def write_conflist(directory: Path, socket: Path) -> bool:
    """Put the conflist in place, whole or not at all; False when it is there already, the same.

    Raises OSError, with the file that could not be written.
    """
    path = directory / CONFLIST
    content = conflist(socket)
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return False
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    # The runtime reads every *.conf, *.conflist and *.json of the folder.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{CONFLIST}.", suffix=".tmp", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(directory)
    return True


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
