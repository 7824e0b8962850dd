"""socket, signal, json and heapq without their Python halves, which PID 1 has no use for: enum, re
and what they import are 1.9 MB and two thirds of its start-up time (measured with -X importtime).
"""

from __future__ import annotations

import _json
import _socket as socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import heapq
    import signal
    from typing import Any
else:
    import _heapq as heapq
    import _signal as signal

__all__ = ["dumps", "heapq", "loads", "signal", "signal_names", "socket"]


def _no_default(value: object) -> object:
    raise TypeError(f"{type(value).__name__} cannot be JSON")


_encode = _json.make_encoder(
    None,  # no check for circles: the recursion limit ends them
    _no_default,
    _json.encode_basestring_ascii,
    None,
    ":",
    ",",
    False,
    False,
    False,
)


class _Decoding:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> object:
        raise ValueError(f"{name} is not JSON")


_scan = _json.make_scanner(_Decoding())  # type: ignore[arg-type]  # any object with these names
_WHITESPACE = " \t\r\n"


def dumps(value: object) -> str:
    """A value as JSON, one ASCII line. Raises TypeError or ValueError when it is not JSON."""
    return "".join(_encode(value, 0))


def loads(text: str) -> Any:
    """The JSON value in text. Raises ValueError (also for NaN, trailing text, too deep a nest)."""
    text = text.strip(_WHITESPACE)
    try:
        value, end = _scan(text, 0)
    except (StopIteration, SystemError):
        # SystemError: the scanner has found a fault but describes it only where json is loaded.
        raise ValueError("not a JSON value") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text):
        raise ValueError(f"text after the JSON value at {end}")
    return value


def signal_names() -> dict[str, int]:
    """The signals' numbers by name, SIGTERM and so on, signal(7)."""
    return {
        name: int(number)
        for name, number in vars(signal).items()
        if name.startswith("SIG") and not name.startswith("SIG_")
    }
