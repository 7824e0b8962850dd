"""LXD's dnsmasq, which serves names to the containers: made to forget what it has cached."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal

_log = logging.getLogger(__name__)


def forget_names(lxd_dir: str) -> None:
    """Empties its cache, in which names of another network may stand, or that they do not exist.

    Source: dnsmasq(8), SIGHUP; it looks at the resolv-file itself whenever that changes.
    """
    try:
        with open(f"{lxd_dir}/networks/lxdbr0/dnsmasq.pid", encoding="utf-8") as file:
            found = re.search(r"\bpid: (\d+)|^(\d+)", file.read())
    except OSError as error:
        _log.warning("cannot find the name server of the containers: %s", error.strerror)
        return
    pid = int(found[1] or found[2]) if found else 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8") as file:
        if file.read().strip() == "dnsmasq":
            os.kill(pid, signal.SIGHUP)
