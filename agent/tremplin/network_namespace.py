"""Visits to the containers' network namespaces, where the kernel is asked what it knows of them."""

from __future__ import annotations

import contextlib
import os

from agent.syscalls import setns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def visits(networks: Iterable[int]) -> Iterator[None]:
    """Within it the calling thread may go from one network namespace to another with setns(), as it
    may with CAP_SYS_ADMIN; in the end it is back, and the files are closed.

    networks: open files of /proc/PID/ns/net. Raises OSError. Source: setns(2).
    """
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.callback(os.close, network)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, own)
        stack.callback(setns, own)
        yield
