"""What the agent answers to ADD, and how each version of the specification writes it.

0.4.0 says each address's family (`version`), 1.0.0 no longer does, and 1.1.0 adds MTUs and more about routes;
what a version does not know is left out. This module is pure; the binary does not need it, for it passes the
agent's answer on as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any


@dataclass(frozen=True, slots=True)
class Interface:
    """A link that was made: `sandbox` is the Pod's namespace path, "" for the host's end; `mtu` in bytes."""

    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Ip:
    """An address with its prefix; `interface` is the index in the result's interfaces."""

    address: IPv4Interface | IPv6Interface
    interface: int | None = None
    gateway: IPv4Address | IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A route in the Pod; `mtu` and `scope` (the kernel's number, 253 is link) exist since 1.1.0."""

    dst: IPv4Network | IPv6Network
    gw: IPv4Address | IPv6Address | None = None
    mtu: int = 0
    scope: int | None = None


@dataclass(frozen=True, slots=True)
class Dns:
    """Name servers of the network; in Kubernetes the kubelet decides these and all is empty."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The result of ADD."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()

    def to_json(self, cni_version: str) -> dict[str, object]:
        """Return the result as that version of the specification writes it."""
        since_1_1 = cni_version == "1.1.0"
        answer: dict[str, object] = {
            "cniVersion": cni_version,
            "interfaces": [_interface(interface, since_1_1) for interface in self.interfaces],
            "ips": [_ip(ip, with_version=cni_version == "0.4.0") for ip in self.ips],
        }
        if self.routes:
            answer["routes"] = [_route(route, since_1_1) for route in self.routes]
        if dns := _dns(self.dns):
            answer["dns"] = dns
        return answer


def parse_result(given: Mapping[str, Any]) -> Result:
    """Return the result in a `prevResult` of any version. Raises ValueError naming what is wrong."""
    try:
        return Result(
            interfaces=tuple(_parse_interface(each) for each in given.get("interfaces") or ()),
            ips=tuple(_parse_ip(each) for each in given.get("ips") or ()),
            routes=tuple(_parse_route(each) for each in given.get("routes") or ()),
            dns=_parse_dns(given.get("dns") or {}),
        )
    except (KeyError, TypeError, AttributeError) as cause:
        raise ValueError(f"prevResult lacks or misstates {cause}") from cause


def _interface(interface: Interface, since_1_1: bool) -> dict[str, object]:
    fields: dict[str, object] = {"name": interface.name}
    if interface.mac:
        fields["mac"] = interface.mac
    if since_1_1 and interface.mtu:
        fields["mtu"] = interface.mtu
    if interface.sandbox:
        fields["sandbox"] = interface.sandbox
    return fields


def _ip(ip: Ip, *, with_version: bool) -> dict[str, object]:
    fields: dict[str, object] = {}
    if with_version:
        fields["version"] = str(ip.address.version)
    if ip.interface is not None:
        fields["interface"] = ip.interface
    fields["address"] = ip.address.with_prefixlen
    if ip.gateway is not None:
        fields["gateway"] = str(ip.gateway)
    return fields


def _route(route: Route, since_1_1: bool) -> dict[str, object]:
    fields: dict[str, object] = {"dst": route.dst.with_prefixlen}
    if route.gw is not None:
        fields["gw"] = str(route.gw)
    if since_1_1 and route.mtu:
        fields["mtu"] = route.mtu
    if since_1_1 and route.scope is not None:
        fields["scope"] = route.scope
    return fields


def _dns(dns: Dns) -> dict[str, object]:
    fields: dict[str, object] = {
        "nameservers": list(dns.nameservers),
        "domain": dns.domain,
        "search": list(dns.search),
        "options": list(dns.options),
    }
    return {name: value for name, value in fields.items() if value}


def _parse_interface(each: Mapping[str, Any]) -> Interface:
    return Interface(each["name"], each.get("mac", ""), each.get("mtu", 0), each.get("sandbox", ""))


def _parse_ip(each: Mapping[str, Any]) -> Ip:
    gateway = each.get("gateway")
    return Ip(ip_interface(each["address"]), each.get("interface"), ip_address(gateway) if gateway else None)


def _parse_route(each: Mapping[str, Any]) -> Route:
    gw = each.get("gw")
    return Route(
        ip_network(each["dst"], strict=False),
        ip_address(gw) if gw else None,
        each.get("mtu", 0),
        each.get("scope"),
    )


def _parse_dns(given: Mapping[str, Any]) -> Dns:
    return Dns(
        tuple(given.get("nameservers") or ()),
        given.get("domain", ""),
        tuple(given.get("search") or ()),
        tuple(given.get("options") or ()),
    )
