"""A CNI request in this node's terms, and what happened here in CNI's. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_interface, ip_network

from agent.pods.ledger import LedgerError
from agent.pods.model import GATEWAYS, Attachment
from cni import spec
from cni.result import Interface, Ip, Result, Route, parse_result
from cni.spec import CniError, Request

_DEFAULT_ROUTES = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
_NAME = re.compile(r"[A-Za-z0-9.-]{0,253}")


def kubernetes_name(request: Request, argument: str) -> str:
    """One of the names in CNI_ARGS, "" where it is missing. Raises CniError 4 for what is none."""
    value = request.args.get(argument, "")
    if not _NAME.fullmatch(value):
        raise CniError(
            spec.INVALID_ENVIRONMENT, f"CNI_ARGS: {argument} is {value[:80]!r}, not a name of Kubernetes"
        )
    return value


def refusal(attachment: Attachment, error: Exception) -> CniError:
    """The error that the runtime is told for one that happened here."""
    if isinstance(error, CniError):
        return error
    code = spec.IO_FAILURE if isinstance(error, LedgerError) else spec.FAILED
    return CniError(code, f"Pod {attachment}: {error}")


def result(attachment: Attachment) -> Result:
    """What ADD answers: both ends, the Pod's addresses and its default routes."""
    a = attachment
    return Result(
        interfaces=(
            Interface(a.link, a.host_mac, a.mtu),
            Interface(a.ifname, a.mac, a.mtu, a.netns),
        ),
        ips=tuple(Ip(ip_interface(address), 1, GATEWAYS[address.version]) for address in a.addresses),
        routes=tuple(Route(_DEFAULT_ROUTES[each.version], GATEWAYS[each.version]) for each in a.addresses),
    )


def unlike_previous(attachment: Attachment, config: Mapping[str, object]) -> list[str]:
    """What the result that the runtime remembers lacks. Raises CniError 7 where it cannot be read."""
    previous = config.get("prevResult")
    try:
        told = {ip.address.ip for ip in parse_result(previous).ips} if isinstance(previous, dict) else set()
    except ValueError as error:
        raise CniError(spec.INVALID_CONFIG, str(error)) from error
    return [f"prevResult lacks its address {each}" for each in attachment.addresses if each not in told]
