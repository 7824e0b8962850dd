"""The program: serves remote shells until SIGTERM.

    python -m agent.shell maitred.shell_listen=unix:/D/shell.sock

maitred starts it, as a process of PID 1, and passes its own options on. It is a process of its own
because it forks, which one that has used gRPC must not.
"""

from __future__ import annotations

import select
import sys

from agent.listening import inherited
from agent.option_table import ALL
from agent.options import from_arguments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SUMMARY = "Serves remote shells."


def main(words: Sequence[str]) -> int:
    """The exit code: 0 after SIGTERM, 1 when it could not serve, 2 for a bad option."""
    sockets = inherited()
    options = from_arguments(words, ALL, module="agent.shell", name="shell", summary=_SUMMARY)
    if isinstance(options, int):
        return options
    address = options["maitred.shell_listen"]
    listening = sockets.get(address)
    if listening is not None:
        # PID 1 lets callers wait. Most VMs are never asked for a shell, and none while it starts.
        poll = select.poll()
        poll.register(listening, select.POLLIN)
        poll.poll()
    from agent.shell.server import run

    return run(address, inherited=listening)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
