"""The command `termina`: run a VM with a container, look at it, stop it, wipe its data."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from host import disks, paths, registry
from host.build_files import BUILD_DIR
from host.errors import HostError, VmDiedError
from host.words import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_STOP_SECONDS = 75.0  # the answer of Shutdown, and the end, have 30 s each

_EXAMPLES = """\
examples:
  termina run                     boot, bring up a Debian container, show it, power off
  termina run --keep              the same, and stay in it; Ctrl-] powers off
  termina run --image busybox --fresh --vm scratch
  termina status                  what runs
  termina shell                   a shell in the container that --keep left running
  termina stop                    power off the VM that --keep left running
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"termina: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _number(low: int, high: int, unit: str) -> type[int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"not a number of {unit} from {low} to {high}: {text}")
        return int(text)

    return parse  # type: ignore[return-value]  # argparse takes any callable, its stubs say type


def _name(text: str) -> str:
    try:
        return registry.check_name(text)
    except HostError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="termina",
        description="Runs a Linux VM for containers, as a ChromeOS or Fuchsia host would.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="boot a VM and bring up a container in it",
        description="Boots a VM, brings up a container with a user in it, shows who and where it "
        "is, and powers the VM off.",
    )
    run.set_defaults(function=_run)
    what = run.add_argument_group("the container")
    what.add_argument(
        "--image", default="debian/bookworm", metavar="ALIAS", help="container image [%(default)s]"
    )
    what.add_argument(
        "--container", default="penguin", metavar="NAME", help="its name [%(default)s]"
    )
    what.add_argument("--user", default="user", metavar="NAME", help="its user [%(default)s]")
    what.add_argument(
        "--image-server",
        metavar="URL",
        help="a simplestreams server as the VM sees it [the images in the build folder]",
    )
    what.add_argument(
        "--image-port",
        type=_number(0, 65535, "a port"),
        default=0,
        metavar="PORT",
        help="where the images of the build folder are served on 127.0.0.1 [any free one]",
    )
    how = run.add_argument_group("the VM")
    _add_vm(how)
    how.add_argument(
        "--keep",
        action="store_true",
        help="leave the VM running with the container's user logged in on the console; Ctrl-] or "
        "`termina stop` powers off",
    )
    how.add_argument(
        "--flow", choices=["newer", "older"], default="newer",
        help="which of the two hosts in the field to be [%(default)s]",
    )  # fmt: skip
    how.add_argument("--fresh", action="store_true", help="begin with a blank data disk")
    _add_data(how)
    how.add_argument(
        "--memory", type=_number(256, 1 << 20, "MiB"), default=1024, metavar="MIB",
        help="of the VM [%(default)s]",
    )  # fmt: skip
    how.add_argument(
        "--cpus", type=_number(1, 64, "processors"), default=min(2, os.cpu_count() or 1),
        metavar="N", help="of the VM [%(default)s]",
    )  # fmt: skip
    how.add_argument(
        "--accelerator", choices=["auto", "kvm", "tcg"], default="auto",
        help="auto: KVM when the kernel really boots under it, else emulation",
    )  # fmt: skip
    how.add_argument(
        "--vsock", choices=["auto", "kernel", "user"], default="auto",
        help="auto: the kernel's vhost-vsock when it can be used, else vhost-device-vsock",
    )  # fmt: skip
    how.add_argument(
        "--timeout", type=_number(1, 86400, "seconds"), default=600, metavar="S",
        help="give up when the container is not ready after that [%(default)s]",
    )  # fmt: skip
    how.add_argument(
        "--build-dir", type=Path, default=BUILD_DIR, metavar="DIR",
        help="with image/ and container-image/ in it [%(default)s]",
    )  # fmt: skip
    how.add_argument(
        "--verbose", action="store_true", help="show the VM's console lines as they come"
    )

    status = commands.add_parser(
        "status",
        help="what runs",
        description="Lists this user's running VMs. Exit code 1 when there is none.",
    )
    status.set_defaults(function=_status)
    status.add_argument("--json", action="store_true", help="one JSON array for programs")

    stop = commands.add_parser(
        "stop",
        help="power off a running VM",
        description="Asks a VM to power off and waits for it; a second time kills it.",
    )
    stop.set_defaults(function=_stop)
    _add_vm(stop)

    console = commands.add_parser(
        "console",
        help="attach to the console of a running VM",
        description="Joins this terminal to a VM's console. Ctrl-] detaches, the VM runs on.",
    )
    console.set_defaults(function=_console)
    _add_vm(console)

    shell = commands.add_parser(
        "shell",
        help="a shell in the container, or in the VM, of a running VM",
        description="Opens a shell, or runs a command, and ends with its exit code. Works in a "
        "terminal and in a pipe.",
        epilog="example: termina shell tar -C /etc -c . >etc.tar",
    )
    shell.set_defaults(function=_shell)
    _add_vm(shell)
    where = shell.add_mutually_exclusive_group()
    where.add_argument("--container", metavar="NAME", help="in this one [that of `termina run`]")
    where.add_argument("--guest", action="store_true", help="in the VM itself")
    shell.add_argument(
        "--user", metavar="NAME", help="whose [the container's user; root in the VM]"
    )
    shell.add_argument("--cwd", default="", metavar="DIR", help="working directory [home]")
    shell.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="may be given several times"
    )
    shell.add_argument("--no-pty", action="store_true", help="no terminal, even where there is one")
    shell.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="instead of a login shell"
    )

    wipe = commands.add_parser(
        "wipe",
        help="delete a VM's data disk",
        description="Deletes a data disk and with it every container on it. Refused while the VM "
        "runs.",
    )
    wipe.set_defaults(function=_wipe)
    _add_vm(wipe)
    _add_data(wipe)
    return parser


def _add_vm(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--vm", type=_name, default="termina", metavar="NAME", help="the VM's name [%(default)s]"
    )


def _add_data(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=f"the data disk, made when it is not there [{paths.data_dir()}/VM.img]",
    )


def data_disk_path(options: argparse.Namespace) -> Path:
    """The data disk that options name."""
    given: Path | None = options.data
    return given or paths.data_dir() / f"{options.vm}.img"


def _run(options: argparse.Namespace) -> int:
    from host.run import run  # gRPC, which the other commands can do without

    return asyncio.run(run(options, data=data_disk_path(options)))


def _status(options: argparse.Namespace) -> int:
    found = registry.running()
    if options.json:
        print(json.dumps([each.state for each in found]))
    elif not found:
        print("no VM is running")
    for each in found if not options.json else []:
        state = each.state
        percent = state.get("percent")
        facts = [
            f"{state.get('status', '?')}{'' if percent is None else f' {percent} %'}",
            f"up {int(time.time() - state['started'])} s",
            f"pid {state['pid']}",
        ]
        facts += [f"{key} {state[key]}" for key in ("container", "user", "ipv4") if key in state]
        print(shown(f"{each.name}: {', '.join(facts)}"))
        print(f"    data {state.get('data')}, log {each.directory / 'console.log'}")
    return 0 if found else EXIT_FAILED


def _stop(options: argparse.Namespace) -> int:
    vm = registry.find(options.vm)
    vm.stop(timeout=_STOP_SECONDS)
    print(f"VM {options.vm} is stopped")
    return 0


def _console(options: argparse.Namespace) -> int:
    from host import terminal

    vm = registry.find(options.vm)
    print("Ctrl-] detaches", file=sys.stderr)
    try:
        asyncio.run(terminal.attach_to_socket(vm.directory / "console.sock"))
    except OSError as error:
        raise HostError(f"cannot attach to VM {options.vm}: {error.strerror}") from None
    return 0


def _shell(options: argparse.Namespace) -> int:
    from host import shell
    from host.vsock import KernelVsock, UserVsock, Vsock

    vm = registry.find(options.vm)
    container = None if options.guest else options.container or vm.state.get("container")
    if container is None and not options.guest:
        raise HostError(
            f"cannot open a shell in VM {options.vm}: its container is not ready; --guest opens "
            "one in the VM itself"
        )
    pty = not options.no_pty and os.isatty(0) and os.isatty(1)
    env = {"TERM": os.environ.get("TERM", "dumb")} if pty else {}
    for pair in options.env:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise HostError(f"cannot use --env {pair}: not KEY=VALUE")
        env[key] = value
    request = shell.request_for(
        options.argv[1:] if options.argv[:1] == ["--"] else options.argv,
        container=container,
        user=options.user or ("root" if options.guest else vm.state.get("user", "root")),
        cwd=options.cwd,
        env=env,
        pty=pty,
    )

    async def session() -> int:
        vsock: Vsock
        if vm.state["vsock"] == "user":
            vsock = UserVsock(vm.directory / "v")
        else:
            vsock = KernelVsock(vm.state["cid"], vm.directory)
        try:
            connection = await vsock.connect(shell.PORT)
        except OSError as error:
            reason = error.strerror or "no answer"
            raise HostError(f"cannot open a shell in VM {options.vm}: {reason}") from None
        return await shell.run(await shell.open_session(connection, request), pty=pty)

    return asyncio.run(session())


def _wipe(options: argparse.Namespace) -> int:
    path = data_disk_path(options)
    print(f"{path} is deleted" if disks.wipe(path) else f"nothing to wipe: there is no {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `termina`. Returns the exit code: 0, 1 for a failure, 2 for bad usage, 130 when it was
    interrupted.
    """
    options = _parser().parse_args(argv)
    try:
        code: int = options.function(options)
    except VmDiedError as error:
        print(shown(f"termina: {error}; its last lines:"), file=sys.stderr)
        for line in error.console_lines:
            print(shown(f"  | {line}"), file=sys.stderr)
        return EXIT_FAILED
    except HostError as error:
        print(shown(f"termina: {error}"), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
