"""Why a connection is allowed or denied: one sentence, then the way step by step. Pure.

    who and whom --> the Service's port and endpoints --> egress of the source --> ingress of each endpoint
      its name         none: why not                         the rule, or how near each came
      is asked of
      the DNS

Answers hold for the first packet of a flow, judged by the objects alone. `legs` is what each node's rules
would have to do for it: who can ask the nodes compares (`agent.explain.legs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agent.cluster.model import IPAddress, Pod, Service
from agent.compile.peers import named_ports
from agent.explain import service as services
from agent.explain.answer import Answer, Step
from agent.explain.fields import Field, parsed
from agent.explain.judged import Sent, judged, kept_in
from agent.explain.legs import Leg
from agent.explain.names import alias_of, looked_up
from agent.explain.question import CannotAnswerError, Question
from agent.explain.route import Route, Target, by_host_port, direct, route
from agent.explain.service import Frontend, HostPort, NoFrontend
from agent.explain.world import Address, End, World, addresses_of, node_of, title


def why(world: World, question: Question) -> Answer:
    """The answer for the first family that both ends have. Raises CannotAnswerError."""
    if isinstance(question.source, Service):
        raise CannotAnswerError(
            f"{title(question.source)} sends nothing: ask about one of its Pods, or all (deploy/NAME, ...)"
        )
    if isinstance(question.source, Pod) and question.source.finished:
        raise CannotAnswerError(
            f"{title(question.source)} has ended ({question.source.phase}): it sends nothing"
        )
    alias = alias_of(world, question)
    if isinstance(alias, Answer):
        return alias
    asked, before = alias or (question, ())
    return looked_up(world, question, _asked(world, asked, before), _asked)


def _asked(world: World, question: Question, before: tuple[Step, ...] = ()) -> Answer:
    source = _source_address(question)
    found = services.frontend(world, question, source)
    ends = Step("name", None, f"{_described(question.source, source)} to {title(question.target)}")
    steps = (*before, ends)
    match found:
        case NoFrontend():
            return _none(question, found, source, steps)
        case Frontend() | HostPort():
            if isinstance(found, Frontend):
                to = route(world, found, question, source)
            else:
                to = by_host_port(world, found, question)
            answer = _through(world, _sent_to(question, source, found, to), found, to, steps)
            another = isinstance(found, Frontend) and found.way and not world.settings_of(to.entry).enabled
            return _by_another_proxy(answer, to.entry) if another else answer
    target = _direct(world, question, source)
    if isinstance(target, NoFrontend):
        return Answer(False, target.cause, f"denied: {target.sentence}", steps)
    way = Sent(question, source, node_of(question.source), target.address, target.port)
    return judged(world, way, (target,), steps)


def _through(
    world: World, way: Sent, found: Frontend | HostPort, to: Route, before: tuple[Step, ...]
) -> Answer:
    """By a Service, or a port of a node: to whichever endpoint it chooses."""
    steps = (*before, Step("service", bool(to.targets), to.sentence, tuple(_fields(found, to))))
    if not to.targets:
        if (kept := kept_in(world, way, steps)) is not None:
            return kept
        legs = (way.leg({}, silent=to.silent),) if way.address is not None and to.entry else ()
        return Answer(False, to.cause, f"denied: {to.sentence}", steps, legs=legs)
    answer = judged(world, way, to.targets, steps)
    if answer.allowed and to.doubt:
        return replace(answer, allowed=False, cause=to.cause, sentence=f"doubtful: {to.doubt}")
    return answer


def _by_another_proxy(answer: Answer, node: str) -> Answer:
    """Where podwall steps aside another proxy should do the same; podwall's rules do nothing of it."""
    said = (
        f"podwall serves no Services{f' on {node}' if node else ''} (setting services): another proxy has to"
    )
    return replace(answer, steps=(*answer.steps, Step("service", None, said)), legs=())


def _none(question: Question, found: NoFrontend, source: IPAddress, steps: tuple[Step, ...]) -> Answer:
    """Nothing of a Service takes it; a port that a ClusterIP does not have is refused by podwall's rules."""
    node, target = node_of(question.source), question.target
    addresses = (question.address,) if question.address else addresses_of(target)
    address = next((each for each in addresses if each.version == source.version), None)
    legs: tuple[Leg, ...] = ()
    of_the_cluster = isinstance(target, Service) and address in target.cluster_ips
    if found.cause == "no-such-port" and of_the_cluster and node and isinstance(question.port, int):
        legs = (Sent(question, source, node, address, question.port).leg({}),)
    return Answer(False, found.cause, f"denied: {found.sentence}", steps, legs=legs)


def _sent_to(question: Question, source: IPAddress, found: Frontend | HostPort, to: Route) -> Sent:
    """What is written into the first packet; a headless Service has no address of its own."""
    if isinstance(found, Frontend):
        sticky = found.service.session_affinity == "ClientIP"
        return Sent(question, source, to.entry, found.address, found.number, sticky)
    return Sent(question, source, to.entry, found.address, found.port.host_port)


def _fields(found: Frontend | HostPort, to: Route) -> Iterator[Field]:
    """What of a Service, or of a Pod, decides where it goes."""
    if isinstance(found, HostPort):
        yield Field("Pod", *found.pod.key, ("spec",))
        return
    service = found.service
    decides = {
        "selector-mismatch": "spec.selector",
        "not-ready": "spec.selector",
        "source-ranges": "spec.loadBalancerSourceRanges",
        "traffic-policy-local": f"spec.{'in' if found.met == 'ClusterIP' else 'ex'}ternalTrafficPolicy",
    }
    index = service.ports.index(found.port)
    path = parsed(decides.get(to.cause, f"spec.ports[{index}]"))
    if to.cause == "target-port":
        path = (*path, "targetPort")
    yield Field("Service", *service.key, path)


# Ends


def _source_address(question: Question) -> IPAddress:
    mine = addresses_of(question.source)
    theirs = (question.address,) if question.address else addresses_of(question.target)
    families = {each.version for each in theirs} or {4, 6}
    wanted = families if question.family is None else families & {question.family}
    for address in mine:
        if address.version in wanted:
            return address
    if not mine:
        raise CannotAnswerError(f"{title(question.source)} has no address yet")
    raise CannotAnswerError(f"{title(question.source)} and {title(question.target)} share no address family")


def _described(end: End, address: IPAddress) -> str:
    where = f" on {end.node}" if isinstance(end, Pod) and end.node else ""
    return str(end) if isinstance(end, Address) else f"{title(end)} ({address}){where}"


def _direct(world: World, question: Question, source: IPAddress) -> Target | NoFrontend:
    """The target itself, at its own port. Raises CannotAnswerError."""
    target = question.target
    if isinstance(target, Pod) and (target.finished or not target.ips):
        what = "has ended" if target.finished else "has no address yet"
        return NoFrontend("not-running", f"{title(target)} {what}: it is {target.phase}")
    for address in (question.address,) if question.address else addresses_of(target):
        if address.version == source.version:
            port = _port_of(target, question)
            return port if isinstance(port, NoFrontend) else direct(world, question, address, port)
    raise CannotAnswerError(f"{title(target)} has no IPv{source.version} address yet")


def _port_of(target: End, question: Question) -> int | NoFrontend:
    port = question.port
    if isinstance(port, int):
        return port
    ports = named_ports(target.ports) if isinstance(target, Pod) else {}
    if isinstance(port, str):
        if (question.protocol, port) in ports:
            return ports[question.protocol, port]
        said = ", ".join(f"{name} {number}" for (_, name), number in sorted(ports.items())) or "none"
        text = f"{title(target)} has no {question.protocol} port named {port!r}; its names are: {said}"
        return NoFrontend("no-such-port", text)
    if isinstance(target, Pod):
        declared = sorted({each.port for each in target.ports if each.protocol == question.protocol})
        if len(declared) == 1:
            return declared[0]
        said = f" (it declares {', '.join(map(str, declared))})" if declared else ""
        raise CannotAnswerError(f"which port of {title(target)}?{said} Write it as {target.name}:PORT")
    raise CannotAnswerError(f"which port of {title(target)}? Write it as NAME:PORT")
