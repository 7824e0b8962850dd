"""The process of LXD itself: started through PID 1 as early as can be. Imports next to nothing, so
that LXD's start and tremplin's own imports run side by side.
"""

from __future__ import annotations

import contextlib
import os

from agent.console import write_line
from agent.process_supervisor.client import Client, Launched, SupervisorError
from agent.process_supervisor.protocol import socket_path
from agent.tremplin import power_cut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Options

_NAME = "lxd"
_STOP_SIGNAL = "SIGPWR"
_STOP_SECONDS = 15.0
"""On SIGPWR LXD stops the containers, each of which has boot.host_shutdown_timeout, 9 s, for it;
after that it forces them down, and ends itself, which take seconds too on a busy machine."""
_SUPERVISOR_SECONDS = 30.0
_LARGEST_LOG = 1024 * 1024
_RUN = """
if [ -e "$1" ]; then
    pkill -KILL -P $PPID -f "^dnsmasq .*$2/networks/"
    rm -f "$2"/networks/*/dnsmasq.pid
else
    : >"$1"
fi
shift 2
exec "$@"
"""
"""What PID 1 runs: $1 marks that LXD was started in this boot, $2 is LXD's directory, then LXD.

An LXD that was killed leaves its name server to PID 1, and one that had no time to note it down
is never ended by the next LXD, which then has no bridge, as the address is in use.
"""


def environment(options: Options) -> dict[str, str]:
    """What LXD and the lxc command are started with."""
    return {
        "LXD_DIR": options["tremplin.lxd_dir"],
        "LXD_CONF": options["tremplin.lxd_conf"],
        "LXD_UNPRIVILEGED_ONLY": "false" if options["tremplin.allow_privileged"] else "true",
    }


def launch(options: Options) -> str:
    """Has PID 1 start LXD, when there is a PID 1 of ours; what was done, for the console.

    Without one, on a development machine, LXD is somebody else's to start. Raises OSError and
    SupervisorError.
    """
    run_dir: str = options["tremplin.run_dir"]
    lxd_dir: str = options["tremplin.lxd_dir"]
    if not os.path.exists(socket_path(run_dir)):
        return "PID 1 is not ours here; waiting for an LXD that somebody else starts"
    os.makedirs(lxd_dir, mode=0o711, exist_ok=True)
    os.makedirs(options["tremplin.lxd_conf"], mode=0o700, exist_ok=True)
    with _connected(run_dir) as client:
        if not _was_launched(client):
            power_cut.put_right(lxd_dir, run_dir)
        launched = _launch(client, _command(lxd_dir, run_dir), environment(options))
    return "LXD is running already" if launched.existing else "LXD is being started"


def _launch(client: Client, command: list[str], env: dict[str, str]) -> Launched:
    while True:
        try:
            return client.launch(
                command,
                name=_NAME,
                env=env,
                respawn=True,
                # SIGTERM would leave the containers running; the order is PID 1's to know.
                stop_signal=_STOP_SIGNAL,
                stop_timeout=_STOP_SECONDS,
            )
        except SupervisorError as error:
            if error.code != "EBUSY":
                raise
        # By a tremplin that was killed meanwhile; PID 1 would not start many of us for that long.
        write_line("tremplin", "waiting for the end of an LXD that is being stopped")
        client.stop(_NAME)


def start_again(run_dir: str) -> None:
    """Has PID 1 of ours start an LXD that was stopped, or died too often to be started again."""
    with contextlib.suppress(SupervisorError), _connected(run_dir) as client:
        if client.info(_NAME)["pid"] is None:
            client.start(_NAME)


def stop(run_dir: str) -> bool:
    """Has LXD stop the containers and end, when PID 1 of ours runs it; whether that is so.

    Not by requests to LXD: PID 1 sends it the same signal soon after, and an LXD that is told in
    both ways waits for containers that are down already until boot.host_shutdown_timeout is over.
    """
    try:
        with _connected(run_dir) as client:
            client.signal(_NAME, _STOP_SIGNAL)
    except SupervisorError:
        return False
    return True


def _connected(run_dir: str) -> Client:
    return Client.connect(run_dir, timeout=_SUPERVISOR_SECONDS)


def _was_launched(client: Client) -> bool:
    try:
        client.info(_NAME)
    except SupervisorError as error:
        if error.code != "ENOENT":
            raise
        return False
    return True


def _command(lxd_dir: str, run_dir: str) -> list[str]:
    log = f"{lxd_dir}/lxd.log"
    try:
        if os.stat(log).st_size > _LARGEST_LOG:
            os.replace(log, f"{log}.1")
    except OSError:
        pass
    group = ["--group", "lxd"] if _group_exists("lxd") else []
    lxd = ["/usr/bin/lxd", *group, "--logfile", log]
    return ["/bin/sh", "-c", _RUN, "lxd", f"{run_dir}/lxd-was-started", lxd_dir, *lxd]


def _group_exists(name: str) -> bool:
    try:
        with open("/etc/group", encoding="utf-8", errors="replace") as file:
            return any(line.startswith(f"{name}:") for line in file)
    except OSError:
        return False


__all__ = ["SupervisorError", "environment", "launch", "start_again", "stop"]
