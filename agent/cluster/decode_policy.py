"""Reads a NetworkPolicy's spec so that no mistake in it opens anything.

    what cannot be used            what becomes of it
    -------------------            ------------------
    a peer, a port, a rule         stays in its place as a Problem, which matches no packet
    a selector inside a peer       the peer is a Problem
    an `except`                    its whole ipBlock is a Problem
    the policy's podSelector       the requirements that can be used select (more Pods, never fewer); no rules
    a policyType                   both directions are isolated
    podwall.dev/mode               the policy is enforced

A field that this version does not know would narrow the allow that it stands in (as endPort once did), so it
makes that allow unusable too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar, cast

from .model import (
    BOTH_DIRECTIONS,
    EVERYTHING,
    MODE_ANNOTATION,
    POLICY_MODES,
    Direction,
    IPBlock,
    IPNetwork,
    Labels,
    LabelSelector,
    NetworkPolicy,
    Operator,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Problem,
    Requirement,
    SelectorPeer,
)
from .values import Found, label_key, label_value, network, port_or_name, protocol, shown

Value = TypeVar("Value")

_SPEC_FIELDS = frozenset(("podSelector", "policyTypes", "ingress", "egress"))
_OPERATORS = frozenset(("In", "NotIn", "Exists", "DoesNotExist"))


def policy_of(base: NetworkPolicy, spec: object, found: Found) -> NetworkPolicy:
    """`base` (metadata only) with what its spec says; all problems of the object go to `found`."""
    mode = base.annotations.get(MODE_ANNOTATION, base.mode)
    if mode not in POLICY_MODES:
        message = f"{shown(mode)} is neither {' nor '.join(POLICY_MODES)}: the policy is enforced"
        found.append(Problem(f"metadata.annotations[{MODE_ANNOTATION}]", message))
    if spec is None:
        spec = {}
    if not _is_object(spec, "spec", found):
        return _with(base, EVERYTHING, BOTH_DIRECTIONS, (), ())
    for name in spec.keys() - _SPEC_FIELDS:
        found.append(Problem(f"spec.{_key(name)}", "podwall does not know this field and leaves it out"))
    before = len(found)
    selector = _selector(spec.get("podSelector"), "spec.podSelector", found)
    selector_usable = len(found) == before
    ingress = _rules(spec.get("ingress"), "spec.ingress", "from", found)
    egress = _rules(spec.get("egress"), "spec.egress", "to", found)
    types = _policy_types(spec, found)
    if not selector_usable:
        return _with(base, selector, types, (), ())
    return _with(base, selector, types, ingress, egress)


def _with(
    base: NetworkPolicy,
    selector: LabelSelector,
    types: frozenset[Direction],
    ingress: tuple[PolicyRule, ...],
    egress: tuple[PolicyRule, ...],
) -> NetworkPolicy:
    return NetworkPolicy(
        namespace=base.namespace,
        name=base.name,
        uid=base.uid,
        pod_selector=selector,
        policy_types=types,
        ingress=ingress,
        egress=egress,
        created=base.created,
        generation=base.generation,
        annotations=base.annotations,
        deleting=base.deleting,
    )


def _policy_types(spec: Mapping[str, Any], found: Found) -> frozenset[Direction]:
    """Missing or empty: Ingress always, Egress when there are egress rules."""
    given = spec.get("policyTypes")
    if given is None or given == []:
        return BOTH_DIRECTIONS if spec.get("egress") not in (None, []) else frozenset(("Ingress",))
    if not isinstance(given, list):
        found.append(
            Problem("spec.policyTypes", f"{shown(given)} is not a list: both directions are isolated")
        )
        return BOTH_DIRECTIONS
    unknown = [
        Problem(
            f"spec.policyTypes[{index}]", f"{shown(item)} is neither Ingress nor Egress: both are isolated"
        )
        for index, item in enumerate(given)
        if item not in ("Ingress", "Egress")
    ]
    found.extend(unknown)
    return BOTH_DIRECTIONS if unknown else frozenset(cast("list[Direction]", given))


def _rules(value: object, field: str, peers_name: str, found: Found) -> tuple[PolicyRule, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        found.append(Problem(field, f"{shown(value)} is not a list of rules: nothing is allowed"))
        return ()
    return tuple(_rule(item, f"{field}[{index}]", peers_name, found) for index, item in enumerate(value))


def _rule(value: object, field: str, peers_name: str, found: Found) -> PolicyRule:
    problems: Found = []
    if not _is_object(value, field, problems) or not _knows(value, (peers_name, "ports"), field, problems):
        found.extend(problems)
        return PolicyRule(peers=(problems[0],))
    return PolicyRule(
        peers=_members(value.get(peers_name), f"{field}.{peers_name}", _peer, found),
        ports=_members(value.get("ports"), f"{field}.ports", _port, found),
    )


def _members(
    value: object, field: str, read: Callable[[object, str, Found], Value | None], found: Found
) -> tuple[Value | Problem, ...] | None:
    """The members that can be used, and the first problem of each that cannot."""
    if value is None:
        return None
    if not isinstance(value, list):
        problem = Problem(field, f"{shown(value)} is not a list: the rule allows nothing")
        found.append(problem)
        return (problem,)
    members: list[Value | Problem] = []
    for index, item in enumerate(value):
        problems: Found = []
        member = read(item, f"{field}[{index}]", problems)
        members.append(problems[0] if problems or member is None else member)
        found.extend(problems)
    return tuple(members)


def _peer(value: object, field: str, found: Found) -> PolicyPeer | None:
    if not _is_object(value, field, found):
        return None
    if not _knows(value, ("podSelector", "namespaceSelector", "ipBlock"), field, found):
        return None
    pods, namespaces, block = (value.get(n) for n in ("podSelector", "namespaceSelector", "ipBlock"))
    if block is not None:
        if pods is not None or namespaces is not None:
            found.append(Problem(field, "ipBlock cannot be combined with podSelector or namespaceSelector"))
        return _ip_block(block, f"{field}.ipBlock", found)
    if pods is None and namespaces is None:
        found.append(Problem(field, "needs a podSelector, a namespaceSelector, both, or an ipBlock"))
    return SelectorPeer(
        pod_selector=None if pods is None else _selector(pods, f"{field}.podSelector", found),
        namespace_selector=None
        if namespaces is None
        else _selector(namespaces, f"{field}.namespaceSelector", found),
    )


def _ip_block(value: object, field: str, found: Found) -> IPBlock | None:
    if not _is_object(value, field, found) or not _knows(value, ("cidr", "except"), field, found):
        return None
    cidr = network(value.get("cidr"), f"{field}.cidr", found)
    given = value.get("except")
    if given is not None and not isinstance(given, list):
        found.append(Problem(f"{field}.except", f"{shown(given)} is not a list of CIDRs"))
    if cidr is None or not isinstance(given, list):
        return None if cidr is None else IPBlock(cidr)
    excepts = [_except(item, cidr, f"{field}.except[{index}]", found) for index, item in enumerate(given)]
    return IPBlock(cidr, tuple(part for part in excepts if part is not None))


def _except(value: object, cidr: IPNetwork, field: str, found: Found) -> IPNetwork | None:
    part = network(value, field, found)
    if part is None:
        return None
    inside = part.version == cidr.version and part.network_address in cidr
    if not inside or part.prefixlen <= cidr.prefixlen:
        found.append(Problem(field, f"{part} is not a part of {cidr}"))
    return part


def _port(value: object, field: str, found: Found) -> PolicyPort | None:
    if not _is_object(value, field, found) or not _knows(
        value, ("protocol", "port", "endPort"), field, found
    ):
        return None
    given, last = value.get("port"), value.get("endPort")
    transport = protocol(_or(value.get("protocol"), "TCP"), f"{field}.protocol", found)
    number = None if given is None else port_or_name(given, f"{field}.port", found)
    if last is not None:
        _check_end_port(given, last, f"{field}.endPort", found)
    return None if transport is None else PolicyPort(transport, number, last)


def _check_end_port(first: object, last: object, field: str, found: Found) -> None:
    if not isinstance(first, int):
        found.append(Problem(field, "needs a port that is a number"))
    elif not isinstance(last, int) or isinstance(last, bool) or not first <= last <= 65535:
        found.append(Problem(field, f"{shown(last)} is not a port number from {first} (port) to 65535"))


def _selector(value: object, field: str, found: Found) -> LabelSelector:
    """The requirements that can be used; anything added to `found` says that there were others."""
    if value is None:
        return EVERYTHING
    if not _is_object(value, field, found):
        return EVERYTHING
    _knows(value, ("matchLabels", "matchExpressions"), field, found)
    labels = _match_labels(_or(value.get("matchLabels"), {}), f"{field}.matchLabels", found)
    given = _or(value.get("matchExpressions"), [])
    if not isinstance(given, list):
        found.append(Problem(f"{field}.matchExpressions", f"{shown(given)} is not a list"))
        given = []
    read = [_requirement(e, f"{field}.matchExpressions[{i}]", found) for i, e in enumerate(given)]
    expressions = {e for e in read if e is not None}
    return LabelSelector(
        tuple(sorted(labels.items())),
        tuple(sorted(expressions, key=lambda e: (e.key, e.operator, e.values))),
    )


def _match_labels(value: object, field: str, found: Found) -> Labels:
    if not _is_object(value, field, found):
        return {}
    labels = {}
    for key, label in value.items():
        if label_key(key) and label_value(label):
            labels[key] = label
        else:
            found.append(
                Problem(f"{field}.{_key(key)}", f"{shown(label)} is not a label that a Pod can have")
            )
    return labels


def _requirement(value: object, field: str, found: Found) -> Requirement | None:
    if not _is_object(value, field, found) or not _knows(value, ("key", "operator", "values"), field, found):
        return None
    key, operator, values = value.get("key"), value.get("operator"), _or(value.get("values"), [])
    if not label_key(key):
        found.append(Problem(f"{field}.key", f"{shown(key)} is not a label's key"))
    elif not isinstance(operator, str) or operator not in _OPERATORS:
        message = f"{shown(operator)} is not an operator: allowed are In, NotIn, Exists, DoesNotExist"
        found.append(Problem(f"{field}.operator", message))
    elif not isinstance(values, list) or not all(label_value(item) for item in values):
        found.append(Problem(f"{field}.values", f"{shown(values)} is not a list of labels' values"))
    elif bool(values) != (operator in ("In", "NotIn")):
        wanted = "at least one value" if not values else "no values"
        found.append(Problem(f"{field}.values", f"{operator} needs {wanted}"))
    else:
        return Requirement(cast("str", key), cast("Operator", operator), tuple(sorted(set(values))))
    return None


def _is_object(value: object, field: str, found: Found) -> TypeGuard[Mapping[str, Any]]:
    if isinstance(value, dict):
        return True
    found.append(Problem(field, f"{shown(value)} is not an object"))
    return False


def _knows(value: Mapping[str, Any], fields: tuple[str, ...], field: str, found: Found) -> bool:
    unknown = [name for name in value if name not in fields]
    found.extend(
        Problem(f"{field}.{_key(name)}", f"unknown field: allowed are {', '.join(fields)}")
        for name in unknown
    )
    return not unknown


def _or(value: object, default: object) -> object:
    return default if value is None else value


def _key(name: object) -> str:
    """A field's name inside a path; other people's text is quoted there."""
    return name if isinstance(name, str) and name.isidentifier() and name.isascii() else shown(name)
