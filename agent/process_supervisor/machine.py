"""Sets up the VM before and while the first processes start (maitred.setup=yes): mounts, limits,
kernel settings, host name, kernel modules. A step that fails is a line on the console, and the boot
goes on. Network settings are maitred's, disks too.
"""

from __future__ import annotations

import os

from agent import syscalls
from agent.console import write_line
from agent.process_supervisor.loop import report
from agent.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REC, MS_SHARED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

HOSTNAME = "termina"
CONSOLE = "/dev/console"
CGROUPS = "/sys/fs/cgroup/supervised"
"""The cgroup below which processes with limits of their own get theirs."""

_PROTECTED = MS_NOSUID | MS_NODEV | MS_NOEXEC

_MOUNTS = (
    # target, filesystem, flags, options
    ("/proc", "proc", _PROTECTED, ""),
    ("/sys", "sysfs", _PROTECTED, ""),
    ("/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
    ("/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("/sys/fs/cgroup", "cgroup2", _PROTECTED, "nsdelegate"),
    ("/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
)

_WRITABLE = ("/etc", "/var", "/mnt", "/opt", "/home", "/root")
"""Directories of the read-only root that get a layer in memory, lost at power-off."""

_LAYERS = "/run/layers"

_LIMITS = (
    # What LXD's documentation asks of a server; resource names without RLIMIT_.
    ("NOFILE", 1048576),
    ("MEMLOCK", -1),
    ("NPROC", -1),
    ("CORE", 0),
)

_SETTINGS = (
    # "Production setup" of LXD's documentation; 0 where it names none.
    ("fs.aio-max-nr", "524288"),
    ("fs.inotify.max_queued_events", "1048576"),
    ("fs.inotify.max_user_instances", "1048576"),
    ("fs.inotify.max_user_watches", "1048576"),
    ("kernel.dmesg_restrict", "1"),
    ("kernel.keys.maxbytes", "2000000"),
    ("kernel.keys.maxkeys", "2000"),
    ("vm.max_map_count", "262144"),
)

_MODULE_LIST = "/etc/maitred/modules"
"""Names of the kernel modules to load while the system is already up, one in a line."""


def step(doing: str, call: Callable[..., object], *args: object) -> None:
    """One step of the set-up, call(*args): its failure is a line on the console."""
    try:
        call(*args)
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        write_line("init", f"cannot {doing}{name}: {error.strerror}")
    except Exception as error:  # noqa: BLE001  # the boot goes on whatever happens
        report(error, doing)


def is_own_machine() -> bool:
    """Whether this is the machine's PID 1: PID 1 of the first PID namespace (pid_namespaces(7)).

    Where /proc is not there yet, PID 1 is believed to be: only a machine starts without.
    """
    if os.getpid() != 1:
        return False
    try:
        # The inode of the first PID namespace is fixed, include/linux/proc_ns.h PROC_PID_INIT_INO.
        return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
    except FileNotFoundError:
        return not os.path.exists("/proc/self")


def mount_kernel_filesystems() -> None:
    """What everything else needs: /proc, /sys, /dev, /run, /tmp and so on."""
    for target, fstype, flags, options in _MOUNTS:
        step(f"mount {fstype} on", _mount, target, fstype, flags, options)


def _mount(target: str, fstype: str, flags: int, options: str) -> None:
    if _is_mount_point(target):
        return
    if not os.path.isdir(target):
        os.mkdir(target, 0o755)
    syscalls.mount(fstype, target, fstype, flags, options)


def _is_mount_point(path: str) -> bool:
    try:
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False


def make_writable() -> None:
    """Layers in memory over the directories that programs write to, when the root is read-only."""
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        return
    step("create", os.mkdir, _LAYERS, 0o700)
    # Its own tmpfs: a container image put in /var by mistake must not fill up /run.
    step("mount tmpfs on", _mount, _LAYERS, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0700")
    for directory in _WRITABLE:
        if os.path.isdir(directory):
            step("put a layer over", _put_layer, directory)


def _put_layer(directory: str) -> None:
    base = f"{_LAYERS}{directory}"
    os.makedirs(f"{base}/upper")
    os.mkdir(f"{base}/work")
    lower = os.stat(directory)
    os.chmod(f"{base}/upper", lower.st_mode & 0o7777)
    os.chown(f"{base}/upper", lower.st_uid, lower.st_gid)
    syscalls.mount(
        "overlay",
        directory,
        "overlay",
        0,
        f"lowerdir={directory},upperdir={base}/upper,workdir={base}/work",
    )


def share_mounts() -> None:
    """Makes every mount shared, so that later ones show in the containers, mount_namespaces(7)."""
    step("share mounts below", syscalls.mount, "", "/", "", MS_REC | MS_SHARED)


def open_console() -> None:
    """Makes the console stdin, stdout and stderr of PID 1.

    Not blocking: a line that the console has no room for is lost, and PID 1 goes on.
    """

    def redirect() -> None:
        fd = os.open(CONSOLE, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        for number in (0, 1, 2):
            os.dup2(fd, number)
        if fd > 2:
            os.close(fd)

    step("open", redirect)


def set_limits() -> None:
    """Resource limits of PID 1, which everything inherits."""
    import resource

    for name, value in _LIMITS:
        limit = resource.RLIM_INFINITY if value < 0 else value
        soft = resource.getrlimit(resource.RLIMIT_CORE)[0] if name == "CORE" else limit
        step(
            f"set the limit {name}",
            resource.setrlimit,
            getattr(resource, f"RLIMIT_{name}"),
            (soft, limit),
        )


def set_hostname() -> None:
    """The host name, and Ctrl-Alt-Del as a signal to PID 1."""
    step("set the host name", syscalls.sethostname, HOSTNAME)
    step("catch Ctrl-Alt-Del", syscalls.disable_ctrl_alt_del)


def apply_settings() -> None:
    """Kernel settings (sysctl) and the cgroup controllers for containers."""
    for name, value in _SETTINGS:
        path = f"/proc/sys/{name.replace('.', '/')}"
        step("write", _write, path, value)
    step("create", os.makedirs, CGROUPS)
    for group in (os.path.dirname(CGROUPS), CGROUPS):
        step("enable the controllers of", _enable_controllers, group)


def _enable_controllers(group: str) -> None:
    with open(f"{group}/cgroup.controllers", encoding="ascii") as file:
        wanted = " ".join(f"+{name}" for name in file.read().split())
    _write(f"{group}/cgroup.subtree_control", wanted)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def modules() -> list[str]:
    """Names of the kernel modules that the image asks for, in order."""
    try:
        with open(_MODULE_LIST, encoding="utf-8", errors="replace") as file:
            return [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except FileNotFoundError:
        return []
