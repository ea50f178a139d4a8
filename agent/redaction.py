"""Takes secrets out of what others get: of objects the fields that matter stay, of lines what is no secret.

    object --fields by kind--> without env, args, volumes, managedFields, foreign annotations
    lines  --patterns--------> tokens, keys, certificates, passwords and credentials in URLs become (removed)

Pure. Fields are named one by one, so what Kubernetes adds later is left out until somebody looks at it. The
lines are the second net, under everything: what no list of fields knows of, such as a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

REMOVED = "(removed)"

_METADATA = (
    "name namespace uid labels generation resourceVersion creationTimestamp deletionTimestamp ownerReferences"
)
_CONTAINER = "name image ports resources restartPolicy"
_POD_SPEC = (
    "nodeName hostNetwork dnsPolicy priorityClassName restartPolicy tolerations nodeSelector "
    "serviceAccountName containers initContainers"
)
_EVENT = (
    "type reason note message action regarding involvedObject reportingController count eventTime "
    "firstTimestamp lastTimestamp series"
)

_FIELDS: Mapping[str, Mapping[str, str]] = {
    "Node": {
        "spec": "podCIDR podCIDRs taints unschedulable",
        "status": "addresses conditions nodeInfo capacity",
    },
    "Namespace": {"status": "phase"},
    "Pod": {
        "spec": _POD_SPEC,
        "status": "phase reason podIP podIPs hostIP hostIPs conditions startTime containerStatuses "
        "initContainerStatuses",
    },
    "Service": {"spec": "*", "status": "*"},
    "NetworkPolicy": {"spec": "*"},
    "EndpointSlice": {"addressType": "", "endpoints": "", "ports": ""},
    "Lease": {"spec": "*"},
    "Event": dict.fromkeys(_EVENT.split(), ""),
    "DaemonSet": {"spec": "selector updateStrategy template", "status": "*"},
    "ConfigMap": {"data": "*"},
}
"""What is kept of each kind beside its name: fields of a part, "*" all of it, "" the field itself."""

_ANNOTATIONS = (
    "podwall.dev/",
    "kubernetes.io/ingress-bandwidth",
    "kubernetes.io/egress-bandwidth",
    "service.",
)
"""How annotations begin whose values podwall reads; of all others only the name stays."""


def kept(item: Mapping[str, Any], kind: str = "") -> dict[str, Any] | None:
    """What may be told of an object; None for a kind that is not told at all, such as a Secret."""
    kind = kind or str(item.get("kind", ""))
    if kind not in _FIELDS:
        return None
    found: dict[str, Any] = {"kind": kind, "metadata": _metadata(item.get("metadata") or {})}
    for name, fields in _FIELDS[kind].items():
        part = item.get(name)
        if part is not None:
            found[name] = _part(part, fields)
    return found


def _part(part: Any, fields: str) -> Any:
    if fields in ("", "*") or not isinstance(part, Mapping):
        return part
    told = {name: part[name] for name in fields.split() if name in part}
    for name in ("containers", "initContainers"):
        if name in told:
            told[name] = [_only(each, _CONTAINER) for each in told[name]]
    if "template" in told:
        template = told["template"]
        told["template"] = {"spec": _part(template.get("spec") or {}, _POD_SPEC)}
    return told


def _only(item: Mapping[str, Any], fields: str) -> dict[str, Any]:
    return {name: item[name] for name in fields.split() if name in item}


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = _only(metadata, _METADATA)
    if annotations := metadata.get("annotations"):
        found["annotations"] = {
            name: value if name.startswith(_ANNOTATIONS) else REMOVED for name, value in annotations.items()
        }
    return found


# Lines

_WORD = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|\\"(?:[^"\\]|\\[^"])*\\"|[^\s"',;&}\]\\]+)"""
_NAME_OF_ONE = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|"
    r"(?:key|certificate|authority)-data|authorization|cookie)[\w-]*"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?-----END [A-Z0-9 ]+-----"), REMOVED),
    (re.compile(r"LS0tLS1CRUdJTi[A-Za-z0-9+/=\\n]*"), REMOVED),
    (re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.?[A-Za-z0-9_-]*"), REMOVED),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {REMOVED}"),
    (re.compile(r"(://)[^\s/@\"']+@"), rf"\1{REMOVED}@"),
    (re.compile(rf"(?i)(?<![\w.-])({_NAME_OF_ONE}\\?[\"']?\s*[:=]\s*)({_WORD})"), ""),
    (re.compile(rf"(?i)(--{_NAME_OF_ONE}\s+)(?!-){_WORD}"), rf"\1{REMOVED}"),
)
_BEGIN, _END = re.compile(r"-----BEGIN [A-Z0-9 ]+-----"), re.compile(r"-----END [A-Z0-9 ]+-----")


def lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines without what looks secret; a key or certificate over several lines becomes one."""
    inside = False
    for text in texts:
        if inside:
            inside = not _END.search(text)
            continue
        told = line(text)
        if begin := _BEGIN.search(told):
            inside = True
            told = told[: begin.start()] + REMOVED
        yield told


def line(text: str) -> str:
    """One line without what looks secret."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead or _unsaid, text)
    return text


def _unsaid(found: re.Match[str]) -> str:
    """The name of a setting without its value, in the value's own quotes, so that JSON stays JSON."""
    name, value = found[1], found[2]
    quote = next((each for each in ('\\"', '"', "'") if value.startswith(each)), "")
    return f"{name}{quote}{REMOVED}{quote}"
