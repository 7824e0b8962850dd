"""PID 1 of the VM, or of a PID namespace on a development machine: `/sbin/init`, or
`python -m agent.process_supervisor OPTION=VALUE...`.
"""

from __future__ import annotations

import os
import sys

from agent.console import write_line
from agent.option_table import ALL
from agent.options import (
    UnixAddress,
    VsockAddress,
    from_arguments,
    from_kernel_command_line,
    parse,
    program,
)
from agent.process_supervisor import STATE_VARIABLE
from agent.process_supervisor.spawn import Stdio
from agent.process_supervisor.supervisor import Supervisor, maitred_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Options
    from agent.prepared import Prepared
    from agent.process_supervisor.protocol import ProcessSpec

_SUMMARY = """\
PID 1: starts maitred and whatever it asks for, reaps, respawns and shuts down. As PID 1 of a
machine it reads the kernel command line too. With maitred.setup=no it leaves the machine alone and
shuts down by ending its descendants and itself."""


_TRY_AGAIN = 5.0
"""Seconds until a program that fails to start after an upgrade is executed again."""


def main(words: list[str], maitred: Prepared | None = None) -> int:
    """Runs PID 1; the exit code, when there is no machine to power off.

    words: the arguments. maitred: its first run, if it was started already.
    """
    handed_over = os.environ.pop(STATE_VARIABLE, "")
    if handed_over.isdigit():
        return _go_on(words, int(handed_over))
    options = from_arguments(
        words, ALL, module="agent.process_supervisor", name="init", summary=_SUMMARY
    )
    if isinstance(options, int):
        return options
    if options["maitred.setup"]:
        return _run_with_setup(words, None, maitred)
    return _run_without_setup(options, None)


def _go_on(words: list[str], state: int) -> int:
    """After an upgrade: whatever is wrong with the new program must not end PID 1.

    state: the memfd of the PID 1 before.
    """
    try:
        options = parse(words, ALL, on_error=_say)
        if options["maitred.setup"]:
            return _run_with_setup(words, state)
        return _run_without_setup(options, state)
    except Exception as error:  # the program may be mended while we wait
        import time

        from agent.process_supervisor.loop import report
        from agent.process_supervisor.upgrade import execute_with

        report(error, "start after the upgrade, and tries again")
        time.sleep(_TRY_AGAIN)
        execute_with(state)
        raise


def _run_with_setup(words: list[str], state: int | None, maitred: Prepared | None = None) -> int:
    """As the PID 1 of a VM: sets it up, and powers it off in the end.

    state: the memfd of the PID 1 before an upgrade; the machine is set up then.
    maitred: see main().
    """
    from agent.process_supervisor import machine

    if os.getpid() == 1:
        os.chdir("/")
    if not machine.is_own_machine():
        write_line("init", "cannot set the machine up: not its PID 1; use maitred.setup=no")
        return 2
    if state is None:
        machine.open_console()
        machine.mount_kernel_filesystems()
    options = _machine_options(words)
    if state is None:
        machine.step("make directories writable", machine.make_writable)
        machine.share_mounts()
        machine.step("set limits", machine.set_limits)
        machine.set_hostname()

    def finish(killed: list[str]) -> None:
        from agent.process_supervisor.power_off import power_off  # loaded by then

        power_off(killed)

    supervisor = Supervisor(
        run_dir=options["maitred.run_dir"],
        stdio=Stdio(machine.CONSOLE),
        log="/dev/log",
        cgroups=machine.CGROUPS,
        descendants_only=False,
        vsock=_listens_on_vsock(options),
        finish=finish,
        maitred=maitred,
    )
    spec = maitred_spec(_maitred_argv(options), _maitred_listen(options))
    ports = _vsock_ports(options)
    if state is not None:
        _take_over(supervisor, state, spec, ports)
    machine.step("open the control socket", supervisor.listen)
    supervisor.reserve(ports)
    supervisor.launch_maitred(spec)

    def afterwards() -> None:
        import agent.process_supervisor.power_off  # noqa: F401  # see load_the_rest

        supervisor.load_the_rest()
        if state is not None:
            return
        machine.apply_settings()
        if modules := machine.modules():
            supervisor.launch_once(["/sbin/modprobe", "-a", *modules], name="modprobe")

    # From the loop, so that maitred's start is not waited for and a fault in here is contained.
    supervisor.loop.call_later(0, afterwards)
    supervisor.run()
    return 0


def _machine_options(words: list[str]) -> Options:
    try:
        with open("/proc/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            words = from_kernel_command_line(file.read()) + words
    except OSError as error:
        write_line("init", f"cannot read the kernel command line: {error.strerror}")
    return parse(words, ALL, on_error=_say)


def _say(error: Exception) -> None:
    write_line("init", str(error))


def _take_over(
    supervisor: Supervisor, state: int, maitred: ProcessSpec, ports: dict[str, str]
) -> None:
    from agent.process_supervisor.takeover import take_over

    take_over(supervisor, state, maitred, ports)


def _run_without_setup(options: Options, state: int | None) -> int:
    """In a PID namespace or as a subreaper: the machine is somebody else's."""
    if os.getpid() != 1:
        import prctl

        prctl.set_child_subreaper(1)

    def finish(killed: list[str]) -> None:
        from agent.process_supervisor.shutdown import summary

        write_line("init", f"exit: {summary(killed, [])}")

    supervisor = Supervisor(
        run_dir=options["maitred.run_dir"],
        stdio=Stdio(None),
        log=None,
        cgroups=None,
        descendants_only=True,
        vsock=_listens_on_vsock(options),
        finish=finish,
    )
    maitred = maitred_spec(_maitred_argv(options), _maitred_listen(options))
    if state is not None:
        _take_over(supervisor, state, maitred, {})
    try:
        supervisor.listen()
    except OSError as error:
        write_line("init", f"cannot listen on {error.filename}: {error.strerror}")
        if state is None:
            return 1
    supervisor.launch_maitred(maitred)
    supervisor.load_the_rest()
    supervisor.run()
    return 0


def _maitred_argv(options: Options) -> list[str]:
    command = options["maitred.command"]
    words = options.words()
    return [command, *words] if command else program("agent.maitred", words)


def _listens_on_vsock(options: Options) -> bool:
    """Outside a VM only when asked for: there, the ports are those of somebody else's VM."""
    asked_for = options["maitred.setup"] or "maitred.listen" in options.given
    return asked_for and isinstance(options["maitred.listen"], VsockAddress)


def _maitred_listen(options: Options) -> list[str]:
    address = options["maitred.listen"]
    if isinstance(address, UnixAddress) or _listens_on_vsock(options):
        return [str(address)]
    return []


def _vsock_ports(options: Options) -> dict[str, str]:
    """The ports that only these processes may ever have; vsock(7) lets anybody take a free one."""
    if not _listens_on_vsock(options):
        return {}
    keys = {"maitred": "maitred.listen", "shell": "maitred.shell_listen"}
    keys["tremplin"] = "tremplin.listen"
    return {
        name: str(options[key])
        for name, key in keys.items()
        if isinstance(options[key], VsockAddress)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
