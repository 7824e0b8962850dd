"""Why a call cannot be served, in words that do not depend on gRPC. servicer.py gives each its
status code.
"""

from __future__ import annotations


class CallError(Exception):
    """str(): one line, "cannot X: why"."""


class BadRequest(CallError):  # noqa: N818  # the words of the wire, like the others here
    """The request could not be served on any machine: INVALID_ARGUMENT."""


class NotNow(CallError):  # noqa: N818
    """The machine is not in the state for it: FAILED_PRECONDITION."""


class Failed(CallError):  # noqa: N818
    """The machine was in the state for it and it went wrong all the same: INTERNAL."""
