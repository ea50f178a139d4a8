"""A Pod's bandwidth limits as queueing disciplines of devices that only the node can reach.

    to the Pod     routed --> [tbf] podwallXXXXXXXX --> eth0
    from the Pod   eth0 --> podwallXXXXXXXX --u32, mirred--> [tbf] podwalliXXXXXXX --> back, routed

A limit inside the Pod's own namespace would be the Pod's to remove, given NET_ADMIN, and a policer drops
where a queue would wait; so what the Pod sends is queued on an ifb device of its own, and comes back with
the link as its incoming device: nftables sees no difference. u32 is the one filter that every kernel with
traffic control has.

Pure. Layouts: linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h.
"""

from __future__ import annotations

import socket
import struct

from agent.pods.rtnetlink import (
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    Place,
    Request,
    attribute,
    nest,
    new_traffic,
    number,
    text,
)

LATENCY_S = 0.025
"""How long a packet may wait in the queue before it is dropped."""

_OPTIONS = 2
_ROOT, _INGRESS, _INGRESS_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFF0000
_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_RATESPEC = struct.Struct("=BBHhHI")
_TBF = struct.Struct("=III")
_ETHERNET = 1  # ratespec.linklayer
_U32_SELECTOR, _U32_ACTIONS, _U32_TERMINAL = 5, 7, 1
_U32 = struct.Struct("=BBBxHHhhI")
_U32_KEY = struct.Struct("=IIii")
_ACT_KIND, _ACT_OPTIONS, _MIRRED_PARMS = 1, 2, 2
_MIRRED = struct.Struct("=IIiiiiI")
_ACT_STOLEN, _EGRESS_REDIRECT = 4, 1
_ALL_PROTOCOLS = (1 << 16) | socket.htons(3)  # priority 1, ETH_P_ALL
_U32_MAX = (1 << 32) - 1


def limit(device: int, rate: int, burst: int, mtu: int) -> Request:
    """Let `rate` bits per second leave a device, and `burst` bits at once (never less than a packet)."""
    rate_bytes = max(rate // 8, 1)
    burst_bytes = min(max(burst // 8, mtu + 22), _U32_MAX)  # Ethernet and two VLAN headers
    queue = min(int(rate_bytes * LATENCY_S) + burst_bytes, _U32_MAX)
    spec = _RATESPEC.pack(0, _ETHERNET, 0, 0, 0, min(rate_bytes, _U32_MAX))
    parameters = spec + _RATESPEC.pack(0, 0, 0, 0, 0, 0) + _TBF.pack(queue, 0, 0)
    options = nest(
        _OPTIONS,
        attribute(_TBF_PARMS, parameters),
        attribute(_TBF_RATE64, struct.pack("=Q", rate_bytes)),
        number(_TBF_BURST, burst_bytes),
    )
    return new_traffic(RTM_NEWQDISC, "tbf", Place(device, _ROOT), options)


def redirect(device: int, to: int) -> list[Request]:
    """Send all that comes in by a device out of another first."""
    mirred = _MIRRED.pack(0, 0, _ACT_STOLEN, 0, 0, _EGRESS_REDIRECT, to)
    action = text(_ACT_KIND, "mirred") + nest(_ACT_OPTIONS, attribute(_MIRRED_PARMS, mirred))
    everything = _U32.pack(_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + _U32_KEY.pack(0, 0, 0, 0)
    options = nest(_OPTIONS, attribute(_U32_SELECTOR, everything), nest(_U32_ACTIONS, nest(1, action)))
    at = Place(device, _INGRESS, _INGRESS_HANDLE)
    return [
        new_traffic(RTM_NEWQDISC, "ingress", at, b""),
        new_traffic(RTM_NEWTFILTER, "u32", Place(device, _INGRESS_HANDLE, 0, _ALL_PROTOCOLS), options),
    ]
