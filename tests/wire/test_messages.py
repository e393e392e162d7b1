"""Messages come out as they went in, and whatever is not one is refused as a whole."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import (
    BadModelFile,
    InvalidArgument,
    NotEnough,
    NotFound,
    QueueFull,
    TramontaneError,
    Unavailable,
)
from runtime.types import Request, SamplingParams
from runtime.wire.messages import BODIES, Refused, WireError, decode, encode, refusal, refusal_error
from tests.wire.values import values

messages = st.sampled_from(sorted(BODIES)).flatmap(
    lambda kind: st.tuples(st.just(kind), values(BODIES[kind]))
)


@settings(max_examples=300, deadline=None)
@given(messages)
def test_round_trip(message):
    kind, body = message
    frame = encode(kind, body)
    assert decode(frame) == (kind, body)
    assert type(decode(frame)[1]) is type(body)
    assert decode(bytearray(frame)) == decode(memoryview(frame)) == (kind, body)


def test_every_kind_of_message_is_made():
    """The strategy above knows all bodies; a new one that it does not know fails here."""
    for kind, body in BODIES.items():
        values(body).validate()
        assert kind


@pytest.mark.parametrize("number", [0.1, -0.0, 5e-324, 1e308, math.inf, -math.inf])
def test_floats_keep_their_bits(number):
    request = Request("r", (1,), SamplingParams(temperature=number))
    got = decode(encode("add", request))[1].params.temperature
    assert math.copysign(1, got) == math.copysign(1, number) and got == number
    nan = decode(encode("add", Request("r", (1,), SamplingParams(top_p=math.nan))))[1]
    assert math.isnan(nan.params.top_p)


@settings(max_examples=300, deadline=None)
@given(messages, st.data())
def test_a_damaged_frame_is_refused_or_is_a_message(message, data):
    frame = bytearray(encode(*message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for damaged in (frame, frame[:cut]):
        try:
            kind, body = decode(damaged)
        except WireError:
            continue
        assert encode(kind, body)  # whatever it is, it has the type that its kind promises


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_surprise(raw):
    try:
        decode(raw)
    except WireError as error:
        assert "\n" not in str(error)


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


ADD = {"request_id": "r", "prompt": [1, 2], "params": {}}


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        packed([]),
        packed(["beat"]),
        packed(["beat", 1, 2]),
        packed({"beat": 1}),
        packed(["no such kind", 1]),
        packed([7, 1]),
        packed([None, None]),
        packed(["beat", "1"]),
        packed(["beat", 1.5]),
        packed(["beat", True]),
        packed(["beat", 1]) + b"\x00",
        packed(["failed", b"bytes"]),
        packed(["load", [1]]),
        packed(["add", {}]),
        packed(["add", {**ADD, "prompt": "ab"}]),
        packed(["add", {**ADD, "prompt": [1.5]}]),
        packed(["add", {**ADD, "prompt": [None]}]),
        packed(["add", {**ADD, "request_id": 7}]),
        packed(["add", {**ADD, "params": {"temperature": "hot"}}]),
        packed(["add", {**ADD, "params": {"seed": 1.5}}]),
        packed(["add", {**ADD, "params": {"logit_bias": [[1]]}}]),
        packed(["add", {**ADD, "params": None}]),
        packed(["abort", {"request_id": "r", "reason": "bored"}]),
        packed(["hello", {"role": "gateway"}]),
        b"\x92\xa4beat\xc1",
        b"\x92\xa4be\xff\xff\x01",
        b"\x92\xa6failed\xa2\xff\xfe",
        b"\x92\xa4beat\xdd\xff\xff\xff\xff",  # an array of four billion entries
        b"\x92\xa6failed\xdb\xff\xff\xff\xff",  # a string of four gigabytes
        b"\x92\xa4beat" + b"\x91" * 2_000_000,
        b"\x91" * 2_000_000,
        b"\x92\xa5token" + b"\x81\xa1a" * 500_000,
    ],
    ids=lambda frame: repr(bytes(frame[:24])),
)
def test_what_is_no_message_is_refused(frame):
    with pytest.raises(WireError):
        decode(frame)


def test_a_sound_message_of_the_kind_above_passes():
    kind, body = decode(packed(["add", ADD]))
    assert kind == "add" and body == Request("r", (1, 2), SamplingParams())


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("max_tokens", "must be at least 1, not 0"),
        NotFound("model", "other", "try this one"),
        QueueFull(1.25),
        QueueFull(0.1, "the queue is full of others"),
        NotEnough("too little memory: give less"),
        Unavailable("the engine is draining"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_comes_back_as_the_same_error(error):
    kind, body = decode(encode("refused", refusal("r", error)))
    again = refusal_error(body)
    assert (kind, body.request_id, type(again)) == ("refused", "r", type(error))
    for name, value in vars(error).items():
        assert getattr(again, name) == value
    if isinstance(error, InvalidArgument | NotEnough | Unavailable):
        assert str(again) == str(error)


@pytest.mark.parametrize("error", [TramontaneError("something else"), BadModelFile("f", "t", "is bad")])
def test_any_other_error_says_that_the_engine_cannot(error):
    again = refusal_error(refusal("r", error))
    assert isinstance(again, Unavailable) and str(error) in str(again)


KINDS = ["QueueFull", "InvalidArgument", "NotFound", "NotEnough", "Unavailable", "Exception"]


@given(values(BODIES["refused"]), st.sampled_from(KINDS))
@example(Refused("r", "", ("soon",)), "QueueFull")
@example(Refused("r", "", ("nan",)), "QueueFull")
@example(Refused("r", "", ("-1",)), "QueueFull")
def test_any_refusal_is_an_error(refused, kind):
    refused = Refused(refused.request_id, kind, refused.detail)
    assert isinstance(refusal_error(refused), TramontaneError)
