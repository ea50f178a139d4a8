"""The message on the socket: what goes in comes out, in pieces of any size, and nothing else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import wire

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(body=st.dictionaries(TEXT, JSON), cuts=st.lists(st.integers(0, 400)))
def test_a_request_in_pieces(body, cuts):
    request = wire.Request("cni.ADD", body)
    assert wire.decode_request(received(request.encode(), cuts)) == request


@given(ok=JSON)
def test_an_answer(ok):
    assert wire.decode_answer(received(wire.Answer(ok).encode(), [])) == wire.Answer(ok)


@given(code=st.integers(1, 1 << 31), msg=TEXT, details=TEXT)
def test_a_failure(code, msg, details):
    failure = wire.Failure(code, msg, details)
    assert wire.decode_answer(received(failure.encode(), [3])) == failure


def received(frame, cuts):
    receiver, at = wire.Receiver(), 0
    for cut in sorted({min(cut, len(frame) - 1) for cut in cuts} - {0}):
        assert receiver.receive(frame[at:cut]) is None
        assert receiver.started
        at = cut
    return receiver.receive(frame[at:])


def test_a_connection_that_was_never_used():
    assert not wire.Receiver().started


@pytest.mark.parametrize("size", [0, wire.LIMIT + 1, 0xFFFFFFFF])
def test_a_length_outside_the_limits(size):
    with pytest.raises(wire.WireError, match="length"):
        wire.Receiver().receive(size.to_bytes(4, "big"))


def test_the_longest_message():
    payload = b'"' + b"x" * (wire.LIMIT - 2) + b'"'
    assert wire.Receiver().receive(len(payload).to_bytes(4, "big") + payload) == payload
    assert len(wire.frame("x" * (wire.LIMIT - 2))) == wire.HEADER + wire.LIMIT
    with pytest.raises(wire.WireError, match="longer"):
        wire.frame("x" * (wire.LIMIT - 1))


def test_bytes_behind_the_message():
    with pytest.raises(wire.WireError, match="1 bytes follow"):
        wire.Receiver().receive(wire.Answer().encode() + b"x")


@pytest.mark.parametrize("value", [{"a": {1, 2}}, {"a": float("nan")}, {"a": "\ud800"}, {"a": b"bytes"}])
def test_what_cannot_be_written(value):
    with pytest.raises(wire.WireError):
        wire.Request("cni.ADD", value).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b'{"call": "", "body": {}}',
        b'{"call": 1, "body": {}}',
        b'{"call": "cni.ADD"}',
        b'{"call": "cni.ADD", "body": []}',
    ],
)
def test_no_request(payload):
    with pytest.raises(wire.WireError):
        wire.decode_request(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b'{"result": 1}',
        b'{"error": null}',
        b'{"error": {}}',
        b'{"error": {"code": 0, "msg": "x"}}',
        b'{"error": {"code": true, "msg": "x"}}',
        b'{"error": {"code": "11", "msg": "x"}}',
        b'{"error": {"code": 11}}',
        b'{"error": {"code": 11, "msg": "x", "details": 7}}',
    ],
)
def test_no_answer(payload):
    with pytest.raises(wire.WireError):
        wire.decode_answer(payload)
