"""The control protocol's messages: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.lean_stdlib import dumps, loads
from agent.process_supervisor.protocol import (
    MAX_LINE,
    SIGNALS,
    STOP_STAGES,
    ProcessSpec,
    ProtocolError,
    decode,
    encode,
)

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
SPECS = st.builds(
    ProcessSpec,
    argv=st.tuples(TEXT.filter(bool)).flatmap(lambda head: st.lists(TEXT).map([*head].__add__)),
    env=st.dictionaries(TEXT.filter(lambda key: bool(key) and "=" not in key), TEXT),
    name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20),
    respawn=st.just(value=True),
    backoff=st.booleans(),
    console=st.booleans(),
    once=st.booleans(),
    listen=st.lists(st.integers(1, 2**32 - 2).map("vsock:{}".format), unique=True, max_size=16),
    stop_signal=st.sampled_from(sorted(SIGNALS)),
    stop_timeout=st.floats(0, 3600),
    stop_stage=st.sampled_from(STOP_STAGES),
)


def refusal(call: Callable[[], object]) -> str | None:
    """The code with which call refuses; None when it does not."""
    try:
        call()
    except ProtocolError as error:
        return error.code
    return None


@given(ANY_JSON)
def test_lean_json_agrees_with_json(value: object) -> None:
    text = json.dumps(value)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        with pytest.raises(ValueError, match="JSON"):
            dumps(value)
        with pytest.raises(ValueError, match="JSON"):
            loads(text)
    else:
        assert json.loads(dumps(value)) == value
        assert loads(text) == value


@given(st.text() | st.text(alphabet='{}[]",:0123456789.-eE\\untrfalse \n'))
def test_lean_json_reads_what_json_reads(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"\w"):
            loads(text)
    else:
        if isinstance(expected, float) and not math.isfinite(expected):
            return  # 1e999 is infinite in both, NaN and Infinity only in json
        assert loads(text) == expected


@given(SPECS)
def test_a_spec_survives_the_wire(spec: ProcessSpec) -> None:
    line = encode({"op": "launch", **spec.to_wire()})
    fields = decode(line)
    assert fields.pop("op") == "launch"
    assert ProcessSpec.from_wire(fields) == spec


@given(st.binary())
def test_any_bytes_are_an_object_or_refused(line: bytes) -> None:
    assert refusal(lambda: decode(line)) in {None, "EINVAL"}


@given(
    st.dictionaries(
        st.sampled_from(sorted(ProcessSpec.__slots__)) | st.text(), ANY_JSON | SPECS.map(str)
    )
)
def test_any_fields_are_a_spec_or_refused(fields: dict[str, object]) -> None:
    assert refusal(lambda: ProcessSpec.from_wire(fields)) in {None, "EINVAL"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "argv is missing"),
        ({"argv": []}, "argv is not valid"),
        ({"argv": [""]}, "argv is not valid"),
        ({"argv": ["a\0b"]}, "argv is not valid"),
        ({"argv": ["\ud800"]}, "argv is not valid"),
        ({"argv": ["a"], "env": {"A=B": "c"}}, "env is not valid"),
        ({"argv": ["a"], "stop_signal": "SIGNOT"}, "stop_signal is not valid: 'SIGNOT'"),
        ({"argv": ["a"], "stop_timeout": True}, "stop_timeout is not valid: True"),
        ({"argv": ["a"], "stop_timeout": math.inf}, "stop_timeout is not valid: inf"),
        ({"argv": ["a"], "once": True}, "once needs a name"),
        ({"argv": ["a"], "backoff": True}, "backoff needs respawn"),
        ({"argv": ["a"], "listen": ["vsock:1"]}, "listen needs a name"),
        ({"argv": ["a"], "listen": ["tcp:1"]}, "listen: not an address of the form vsock:PORT or"),
        ({"argv": ["a"], "listen": ["vsock:0"]}, "listen: port is not a number from 1 to"),
        ({"argv": ["a"], "listen": ["unix:/\ud800"]}, "listen is not valid"),
        ({"argv": ["a"], "listen": "unix:/a"}, "listen is not valid: 'unix:/a'"),
        ({"argv": ["a"], "listen": ["vsock:1", "vsock:01"]}, "listen has an address twice"),
        ({"argv": ["a"], "cmd": "b"}, "there is no field 'cmd'"),
    ],
)
def test_a_bad_spec_is_refused_with_the_reason(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        ProcessSpec.from_wire(fields)


def test_a_message_that_is_too_long_is_refused() -> None:
    with pytest.raises(ProtocolError, match="longer than 65536") as caught:
        encode({"argv": ["x" * MAX_LINE]})
    assert caught.value.code == "E2BIG"
