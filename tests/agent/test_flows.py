"""Late answers to ended flows are flows of their own, the other way round: they end too, for a while."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from agent.conntrack import Endpoint, Ends, Flow, Icmp
from agent.flows import ANSWER_S, Answers
from agent.nft.model import CtStatus, Proto

CLIENT = Endpoint(ip_address("10.244.1.7"), 41000)
SERVER = Endpoint(ip_address("10.244.2.9"), 7000)
OTHER = Endpoint(ip_address("10.244.2.9"), 7001)


def flow(source: Endpoint, target: Endpoint, protocol: int = Proto.UDP, icmp: Icmp | None = None) -> Flow:
    return Flow(
        protocol=protocol,
        original=Ends(source, target),
        reply=Ends(target, source),
        status=CtStatus(0),
        icmp=icmp,
    )


def from_server(flow: Flow) -> bool:
    return flow.source.address == SERVER.address


@pytest.mark.parametrize(
    ("name", "late", "ended"),
    [
        ("the answer", flow(SERVER, CLIENT), True),
        ("from another port", flow(OTHER, CLIENT), False),
        ("of another protocol", flow(SERVER, CLIENT, Proto.SCTP), False),
    ],
)
def test_what_looks_like_an_answer_ends(name: str, late: Flow, ended: bool) -> None:
    judge = Answers().judge(from_server)

    assert judge(late), "before anything ended"
    assert not judge(flow(CLIENT, SERVER))
    assert judge(late) is not ended, name


def test_it_may_begin_after_a_while() -> None:
    now = [0.0]
    answers = Answers(lambda: now[0])
    judge = answers.judge(from_server)
    assert not answers.awaited()
    judge(flow(CLIENT, SERVER))
    assert answers.awaited()

    now[0] = ANSWER_S - 0.01
    assert not judge(flow(SERVER, CLIENT))
    now[0] = ANSWER_S + 0.01

    assert judge(flow(SERVER, CLIENT)), "what ended as an answer is not remembered itself"
    assert not answers.awaited()


@pytest.mark.parametrize(
    ("protocol", "icmp"), [(Proto.TCP, None), (Proto.ICMP, Icmp(8, 0, 7))], ids=["tcp", "icmp"]
)
def test_what_says_that_it_begins_is_never_an_answer(protocol: int, icmp: Icmp | None) -> None:
    answers = Answers()
    judge = answers.judge(from_server)
    judge(flow(CLIENT, SERVER, protocol, icmp))

    assert not answers.awaited()
    assert judge(flow(SERVER, CLIENT, protocol, icmp))
