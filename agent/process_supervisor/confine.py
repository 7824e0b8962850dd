"""Starts a process with less than full root: user and group, no_new_privs, capabilities, resource
limits, a cgroup. By fork, as posix_spawn(3) has none of it; PID 1 has one thread, so that is safe.
Loaded when the first such process is launched.
"""

from __future__ import annotations

import errno
import os

from agent.lean_stdlib import signal
from agent.process_supervisor.spawn import move_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from agent.process_supervisor.protocol import ProcessSpec

_CAPABILITIES = """
chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot
sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease
audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read
perfmon bpf checkpoint_restore
"""  # linux/capability.h, in the order of their numbers

_BY_NAME = {name: number for number, name in enumerate(_CAPABILITIES.split())}


def capability_number(name: str) -> int:
    """The number of net_admin, cap_net_admin or CAP_NET_ADMIN. Raises ValueError."""
    short = name.lower().removeprefix("cap_")
    if short not in _BY_NAME:
        raise ValueError(f"there is no capability {name}")
    return _BY_NAME[short]


def spawn_confined(
    program: str,
    spec: ProcessSpec,
    env: Mapping[str, str],
    actions: list[tuple[Any, ...]],
    cgroup: str,
) -> int:
    """Starts program as spec says; the pid.

    actions: descriptors to set up, as for posix_spawn. cgroup: see spawn().
    Raises OSError or ValueError when any part of it cannot be had; nothing runs then.
    """
    kept = None if spec.capabilities is None else set(map(capability_number, spec.capabilities))
    limited = spec.memory_max or spec.pids_max
    if limited:
        _make_cgroup(cgroup, spec)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        writer = move_up(writer)  # where it is, a descriptor of the process's own may come
    except OSError:
        os.close(reader)
        raise
    # No handler of PID 1 may run in the child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                if limited:
                    _join(cgroup)
                _become(spec, actions, kept)
                os.execve(program, spec.argv, {**_set_user(spec), **env})
            except OSError as error:
                os.write(writer, f"{error.errno or errno.EIO}".encode())
            except BaseException as error:  # noqa: BLE001  # the parent is told, whatever it is
                os.write(writer, f"0 {error}".encode())
            finally:
                os._exit(127)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writer)
    with open(reader, "rb") as pipe:
        failure = pipe.read()  # ends when the child executes the program, or ends
    if failure:
        os.waitpid(pid, 0)
        if limited:
            remove_cgroup(cgroup)
        number, _, text = failure.decode(errors="replace").partition(" ")
        raise OSError(int(number), os.strerror(int(number))) if int(number) else ValueError(text)
    return pid


def _join(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as file:
        file.write("0")


def _become(spec: ProcessSpec, actions: list[tuple[Any, ...]], kept: set[int] | None) -> None:
    """In the child: takes everything on but the user, who may do nothing of all this."""
    os.setsid()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _set_stdio(actions)
    _set_limits(spec)
    if kept is not None:
        _drop_capabilities(kept)
    if spec.no_new_privs:
        import prctl

        prctl.set_no_new_privs(1)


def _set_stdio(actions: list[tuple[Any, ...]]) -> None:
    for action, first, *rest in actions:
        if action == os.POSIX_SPAWN_OPEN:
            fd = os.open(*rest)
            os.dup2(fd, first)
            if fd != first:
                os.close(fd)
        else:
            os.dup2(first, rest[0])


def _set_limits(spec: ProcessSpec) -> None:
    import resource

    for name, (soft, hard) in spec.rlimits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (soft, hard))


def _drop_capabilities(kept: set[int]) -> None:
    import prctl

    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for number in range(last + 1):
        if number not in kept:
            prctl.capbset_drop(number)


def _set_user(spec: ProcessSpec) -> dict[str, str]:
    """Becomes the user and group; what the environment should say of the user."""
    if not (spec.user or spec.group):
        return {}
    import grp
    import pwd

    try:
        account = pwd.getpwnam(spec.user) if spec.user else None
        group = grp.getgrnam(spec.group).gr_gid if spec.group else None
    except KeyError as error:
        raise ValueError(str(error).strip("'\"")) from None
    if group is None and account:
        group = account.pw_gid
    if group is not None:
        os.setgroups(os.getgrouplist(spec.user, group) if account else [group])
        os.setgid(group)
    if account is None:
        return {}
    os.setuid(account.pw_uid)
    return {"HOME": account.pw_dir, "USER": spec.user, "LOGNAME": spec.user}


def _make_cgroup(cgroup: str, spec: ProcessSpec) -> None:
    if not cgroup:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    os.makedirs(cgroup, exist_ok=True)
    for setting, value in (("memory.max", spec.memory_max), ("pids.max", spec.pids_max)):
        with open(f"{cgroup}/{setting}", "w", encoding="ascii") as file:
            file.write(str(value or "max"))


def remove_cgroup(cgroup: str) -> bool:
    """Removes the cgroup of a process that has ended; False while something runs in it."""
    try:
        os.rmdir(cgroup)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
