"""What a Pod learns when it looks up the name of its target: an alias, or nothing for it may not ask. Pure.

Service of type ExternalName --> what its CNAME stands for: something of this cluster, or a name outside
any Service --> may the Pod ask the cluster's DNS? whom policies isolate for egress often may not
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agent.cluster.model import Pod, Service
from agent.explain.answer import Answer, Step
from agent.explain.fields import Field
from agent.explain.policy import isolated_by
from agent.explain.question import Question
from agent.explain.world import UnknownNameError, World, title

DNS_LABEL = ("k8s-app", "kube-dns")  # by which kubeadm, kind and their DNS find themselves
DNS_NAMESPACE, DNS_PORT = "kube-system", 53

Ask = Callable[[World, Question], Answer]


def alias_of(world: World, question: Question) -> tuple[Question, tuple[Step, ...]] | Answer | None:
    """What a Service of type ExternalName stands for: something of this cluster, or a name outside of it."""
    target = question.target
    if not isinstance(target, Service) or target.type != "ExternalName":
        return None
    field = (Field("Service", *target.key, ("spec", "externalName")),)
    said = Step("dns", None, f"{title(target)} is an alias: its name answers {target.external_name}", field)
    try:
        there = world.named(target.external_name, target.namespace)
    except UnknownNameError:
        return _outside_name(world, question, target, said)
    if isinstance(there, Service) and there.type == "ExternalName":
        return _outside_name(world, question, target, said)
    return replace(question, target=there), (said,)


def _outside_name(world: World, question: Question, alias: Service, said: Step) -> Answer:
    pod = question.source
    name = f"{title(alias)} is an alias of {alias.external_name} (CNAME)"
    isolating = isolated_by(world, "Egress", pod) if isinstance(pod, Pod) and not pod.host_network else ()
    if isolating:
        names = ", ".join("/".join(policy.key) for policy in isolating)
        text = f"doubtful: {name}, and {names} decide by the address that it has: ask about that"
        return Answer(False, "external-name", text, (said,))
    text = f"allowed: {name}, and no policy isolates {title(question.source)} for egress"
    return Answer(True, "external-name", text, (said,))


def looked_up(world: World, question: Question, answer: Answer, ask: Ask) -> Answer:
    """With the name's lookup, when the target was asked for by one and policies decide who may look it up."""
    lookup = _lookup(world, question, ask)
    if lookup is None:
        return answer
    dns = next(step for step in reversed(lookup.steps) if step.stage in {"egress", "ingress"})
    server = title(_dns(world) or question.target)
    if lookup.allowed:
        step = Step("dns", True, f"its name is looked up at {server}: {dns.text}", dns.fields)
        return replace(answer, steps=(step, *answer.steps))
    denial = next(step for step in lookup.steps if step.ok is False)
    step = Step("dns", False, f"its name is looked up at {server}: {denial.text}", denial.fields)
    if not answer.allowed:
        return replace(answer, steps=(step, *answer.steps), changes=(*lookup.changes, *answer.changes))
    sentence = (
        f"denied: {title(question.source)} may not ask the cluster's DNS for the address of "
        f"{title(question.target)}: {lookup.denial}"
    )
    return Answer(False, "dns-denied", sentence, (step, *answer.steps), lookup.changes, answer.legs)


def _lookup(world: World, question: Question, ask: Ask) -> Answer | None:
    """What becomes of the question to the DNS; None when there is none, or nothing decides about it."""
    source, dns = question.source, _dns(world)
    if dns is None or not question.by_name or not isinstance(question.target, Service):
        return None
    if not isinstance(source, Pod) or source.host_network or not isolated_by(world, "Egress", source):
        return None
    families = {ip.version for ip in source.ips}
    address = next((ip for ip in dns.cluster_ips if ip.version in families), None)
    if address is None or dns.key == question.target.key:
        return None
    asks = Question(source=source, target=dns, port=DNS_PORT, protocol="UDP", address=address)
    answer = ask(world, asks)
    return answer if any(step.stage in {"egress", "ingress"} for step in answer.steps) else None


def _dns(world: World) -> Service | None:
    name, value = DNS_LABEL
    for service in world.snapshot.services.values():
        if service.namespace == DNS_NAMESPACE and not service.headless:
            named = service.labels.get(name) == value or service.name == value
            if named and any(each.port == DNS_PORT and each.protocol == "UDP" for each in service.ports):
                return service
    return None
