"""The program: serves syslog(3), reads the kernel's log, sends both to the host until SIGTERM.

    python -m agent.log_forwarder maitred.log_collector=unix:/D/host.sock maitred.syslog=/D/log

maitred starts it, as a process of PID 1, and passes its own options on.
"""

from __future__ import annotations

import os
import sys

from agent.console import write_line
from agent.option_table import ALL
from agent.options import from_arguments
from agent.out_of_memory import spare_us

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SUMMARY = "Sends logs to the host."
_NICE = 10


def main(words: Sequence[str]) -> int:
    """The exit code: 0 after SIGTERM, 1 when it could not serve, 2 for a bad option."""
    options = from_arguments(
        words, ALL, module="agent.log_forwarder", name="logs", summary=_SUMMARY
    )
    if isinstance(options, int):
        return options
    from agent.log_forwarder import sources

    try:
        # At once, so that nobody's messages are lost while the rest is imported.
        syslog = sources.open_syslog(options)
        kernel = sources.open_kernel_log(options)
    except OSError as error:
        write_line("logs", f"cannot start: {error}")
        return 1
    if options["maitred.setup"]:
        spare_us()
    # Logs can wait, the start of the VM cannot.
    os.nice(_NICE)
    from agent.log_forwarder.daemon import run

    return run(options, syslog=syslog, kernel=kernel)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
