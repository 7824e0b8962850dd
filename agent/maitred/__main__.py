"""The program: listens, tells the host that the VM is ready, and serves until SIGTERM.

    python -m agent.maitred maitred.listen=unix:/D/maitred.sock maitred.run_dir=/D/run

Between exec and VmReady every import counts ten times, the guest being emulated: what is not
needed for those two is imported later, where it is.
"""

from __future__ import annotations

import sys

from agent import prepared
from agent.listening import by_address, inherited
from agent.option_table import ALL
from agent.options import from_arguments
from agent.out_of_memory import spare_us

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SUMMARY = "Serves Maitred, the guest's side of a VM."


def main(words: Sequence[str]) -> int:
    """The exit code: 0 after SIGTERM, 1 when it could not serve, 2 for a bad option."""
    if list(words) == [prepared.OPTION]:
        _import_the_rest()
        told = prepared.wait()
        if told is None:
            return 0
        words, sockets = told[0], by_address(told[1])
    else:
        sockets = inherited()
    options = from_arguments(words, ALL, module="agent.maitred", name="maitred", summary=_SUMMARY)
    if isinstance(options, int):
        return options
    _import_the_rest()
    from agent.maitred.daemon import run

    if options["maitred.setup"]:
        spare_us()
    return run(options, sockets)


def _import_the_rest() -> None:
    _import_asyncio()
    import agent.maitred.daemon  # noqa: F401  # for its effect


def _import_asyncio() -> None:
    if "asyncio" in sys.modules:  # by one that was prepared
        return
    # asyncio does without TLS where Python has none. It would never be used here, and importing it
    # takes a tenth of the time until VmReady.
    sys.modules["ssl"] = None  # type: ignore[assignment]  # makes the import fail
    import asyncio  # noqa: F401  # for its effect

    del sys.modules["ssl"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
