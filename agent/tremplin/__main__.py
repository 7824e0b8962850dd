"""Tremplin: `python -m agent.tremplin OPTION=VALUE...`. LXD is started before anything large is
imported, so that the two go on side by side.
"""

from __future__ import annotations

import sys

from agent.console import write_line
from agent.listening import inherited
from agent.option_table import TREMPLIN
from agent.options import from_arguments
from agent.out_of_memory import spare_us
from agent.tremplin.lxd_process import SupervisorError, launch

_SUMMARY = "Serves vm_tools.tremplin.Tremplin: creates, starts and sets up containers in LXD."


def main(words: list[str]) -> int:
    """Runs tremplin. words: its arguments. The exit code: 2 for options that cannot be used."""
    sockets = inherited()
    options = from_arguments(
        words, TREMPLIN, module="agent.tremplin", name="tremplin", summary=_SUMMARY
    )
    if isinstance(options, int):
        return options
    try:
        write_line("tremplin", launch(options))
    except (OSError, SupervisorError) as error:
        write_line("tremplin", f"cannot start LXD: {error}")
        return 1

    spare_us()
    import asyncio

    from agent import logs
    from agent.tremplin.daemon import serve

    logs.set_up("tremplin")
    try:
        asyncio.run(serve(options, sockets))
    except OSError as error:
        write_line("tremplin", f"cannot serve: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
