"""The program: serves remote shells until SIGTERM.

    python -m agent.shell maitred.shell_listen=unix:/D/shell.sock

maitred starts it, as a process of PID 1, and passes its own options on. It is a process of its own
because it forks, which one that has used gRPC must not.
"""

from __future__ import annotations

import os
import sys

from agent.console import write_line
from agent.listening import inherited
from agent.option_table import ALL
from agent.options import OptionError, parse, usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_NICE = 10


def main(words: Sequence[str]) -> int:
    """The exit code: 0 after SIGTERM, 1 when it could not serve, 2 for a bad option."""
    sockets = inherited()
    if "--help" in words or "-h" in words:
        text = usage("python -m agent.shell", "Serves remote shells.", ALL)
        sys.stdout.write(text + "\n")
        return 0
    try:
        options = parse(words, ALL)
    except OptionError as error:
        write_line("shell", str(error))
        return 2
    # Nobody waits for a shell while the VM starts; what runs in a session is as urgent as usual.
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    from agent.shell.server import run

    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except PermissionError:
        pass
    address = options["maitred.shell_listen"]
    return run(address, inherited=sockets.get(address))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
