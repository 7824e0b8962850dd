"""The end of the machine, after its processes are gone: swap off, loop devices detached, every
filesystem unmounted or named, sync, power off. Only in a VM that is ours (maitred.setup=yes).
"""

from __future__ import annotations

import fcntl
import os

from agent import mount_table, syscalls
from agent.console import write_line
from agent.process_supervisor.loop import report
from agent.process_supervisor.shutdown import summary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MARKER = "maitred: power off"
"""The last line on the console has this text, and the host's launcher looks for it: it tells a
power-off, after which `maitred: power off: clean` or what was not clean stands there, from a panic.
"""

_LOOP_CLR_FD = 0x4C01  # linux/loop.h

_KEPT = ("/proc", "/sys", "/dev")
"""Not unmounted, nor what is below: nothing there is on a disk, and the shutdown needs it."""


def power_off(killed: list[str]) -> None:
    """Everything after the processes. Does not return when reboot(2) does its work.

    killed: the processes that had to be killed, for the last line.
    """
    left: list[str] = []
    _contained("switch the swap off", _swap_off)
    _contained("detach loop devices", _detach_loop_devices)
    _contained("unmount", lambda: left.extend(_unmount_all()))
    _contained("detach loop devices", _detach_loop_devices)
    os.sync()
    program, text = MARKER.split(": ")
    write_line(program, f"{text}: {summary(killed, left)}")
    _contained("power off", syscalls.power_off)


def _contained(doing: str, step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:  # noqa: BLE001  # the next step is worth trying whatever happens
        report(error, doing)


def _swap_off() -> None:
    with open("/proc/swaps", encoding="utf-8") as file:
        areas = [line.split()[0] for line in file.readlines()[1:]]
    for area in areas:
        try:
            syscalls.swapoff(mount_table.unescape(area))
        except OSError as error:
            write_line("init", f"cannot switch swap {area} off: {error.strerror}")


def _detach_loop_devices() -> None:
    """Detaches every bound loop device; one that is mounted goes when it is unmounted, loop(4)."""
    for name in os.listdir("/sys/block"):
        if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file"):
            try:
                fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, _LOOP_CLR_FD)
                finally:
                    os.close(fd)
            except OSError as error:
                write_line("init", f"cannot detach {name}: {error.strerror}")


def _unmount_all() -> list[str]:
    """Unmounts in reverse order until nothing more goes; what is left.

    The root is made read-only instead of unmounted: this program runs from it.
    """
    mounted = mount_table.read()
    in_memory = {mount.target for mount in mounted if mount.fstype == "tmpfs"}
    targets = [
        mount.target
        for mount in mounted
        if mount.target != "/"
        and not any(f"{mount.target}/".startswith(f"{kept}/") for kept in _KEPT)
    ]
    targets.reverse()
    reasons: dict[str, str] = {}
    progress = True
    while targets and progress:
        progress = False
        for target in list(targets):
            try:
                syscalls.umount(target, syscalls.UMOUNT_NOFOLLOW)
            except OSError as error:
                reasons[target] = str(error.strerror)
            else:
                targets.remove(target)
                progress = True
    try:
        syscalls.mount("", "/", "", syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    except OSError as error:
        targets.append("/")
        reasons["/"] = str(error.strerror)
    for target in targets:
        # Read-only at least, so that what is on the disk is whole.
        try:
            syscalls.mount("", target, "", syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
        except OSError:
            pass
    # A tmpfs is kept busy by the sockets in it, this program's among them, and has nothing to lose.
    return [f"{target} ({reasons[target]})" for target in targets if target not in in_memory]
