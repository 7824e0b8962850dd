"""termina-ctl: shows and steers what PID 1 supervises, from inside the VM. A client like others."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from agent.process_supervisor.client import Client, SupervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_RUN_DIR = "/run/maitred"


def main(words: Sequence[str]) -> int:
    """Runs one command; the exit code: 1 when PID 1 refuses, 2 for a wrong command line."""
    arguments = _parser().parse_args(words)
    try:
        with Client.connect(arguments.run_dir) as client:
            code: int | None = arguments.command(client, arguments)
            return code or 0
    except SupervisorError as error:
        print(f"termina-ctl: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains at its exit
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="termina-ctl",
        description="Shows and steers the processes that PID 1 supervises.",
    )
    parser.add_argument("--run-dir", default=_RUN_DIR, help="PID 1's run directory [%(default)s]")
    parser.add_argument("--json", action="store_true", help="JSON, one value in a line")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(command=_list)

    def add(name: str, command: Callable[..., int | None], text: str, *words: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        for word in words:
            sub.add_argument(word)
        return sub

    add("list", _list, "every process: state, pid, uptime, starts, last exit")
    add("show", _show, "everything about one process", "key")
    output = add("output", _output, "what a process without console has printed, the last 64 KiB")
    output.add_argument("key")
    output.add_argument(
        "-f", "--follow", action="store_true", help="and what it prints from now on"
    )
    add("events", _events, "follow what happens, until interrupted")
    add("stop", _stop, "end a process and do not start it again; returns when it has ended", "key")
    add("start", _start, "start a process again that has ended", "key")
    add("restart", _restart, "stop and start", "key")
    add("signal", _signal, "send a signal, by name or number", "key", "signal")
    add("wait", _wait, "wait for the next exit; exits like the process", "key")
    launch = add("launch", _launch, "launch a process")
    launch.add_argument("--name", default="", help="unique name")
    launch.add_argument("--respawn", action="store_true", help="start it again when it ends")
    launch.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="vsock:PORT or unix:/path that PID 1 listens on for it; again for more of them",
    )
    launch.add_argument("--wait", action="store_true", help="wait for its exit; exits like it")
    launch.add_argument(
        "argv", nargs="+", metavar="ARGUMENT", help="program and arguments, after --"
    )
    add("upgrade", _upgrade, "PID 1 executes itself anew and keeps every process")
    add("shutdown", _shutdown, "end every process and power off")
    return parser


def _say(arguments: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value) if arguments.json else text, flush=True)  # noqa: T201


def _seconds(seconds: float) -> str:
    """A duration for people: 4.2s, 3m07s, 2h05m, 3d04h."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02}h"


def _exit_text(row: dict[str, Any]) -> str:
    last = row.get("last_exit")
    if not last:
        return "-"
    word = "exit" if last["status"] == "exited" else "signal"
    return f"{word} {last['code']}, {_seconds(last['ago'])} ago"


def _since(row: dict[str, Any]) -> str:
    if "uptime" in row:
        return _seconds(row["uptime"])
    return f"in {_seconds(row['due'])}" if "due" in row else "-"


def _list(client: Client, arguments: argparse.Namespace) -> None:
    rows = client.list()
    if arguments.json:
        for row in rows:
            _say(arguments, row, "")
        return
    table = [("KEY", "STATE", "PID", "UPTIME", "STARTS", "LAST EXIT", "COMMAND")]
    table += [
        (
            row["key"],
            row["state"] + (" (respawn)" if row["respawn"] else ""),
            str(row["pid"] or "-"),
            _since(row),
            str(row["starts"]),
            _exit_text(row),
            " ".join(row["argv"]),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    room = os.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        text = "  ".join([*cells, line[6]])
        _say(arguments, None, text[:room] if room else text)


def _show(client: Client, arguments: argparse.Namespace) -> None:
    row = client.info(arguments.key)
    lines = {
        "key": row["key"],
        "command": " ".join(row["argv"]),
        "state": row["state"] + (f": {row['reason']}" if "reason" in row else ""),
        "pid": row["pid"] or "-",
        "up": _since(row),
        "starts": f"{row['starts']}, {row['recent_starts']} of them in the last 30 s",
        "last exit": _exit_text(row),
        "listens on": ", ".join(row.get("listen", ())) or "-",
        "options": ", ".join(
            name for name in ("respawn", "backoff", "console", "once") if row.get(name)
        )
        or "-",
    }
    _say(arguments, row, "\n".join(f"{name:10} {value}" for name, value in lines.items()))


def _output(client: Client, arguments: argparse.Namespace) -> None:
    with Client.connect(arguments.run_dir) as follower:
        # Followed before it is read: nothing that is printed in between is lost.
        events = follower.events(output=True) if arguments.follow else iter(())
        offset, output = client.output(arguments.key)
        _print_output(arguments, output)
        for event in events:
            if event.name == "output" and event.key == arguments.key:
                # By offset, as some of it may have been in the first answer already.
                offset, output = client.output(arguments.key, offset)
                _print_output(arguments, output)


def _print_output(arguments: argparse.Namespace, output: bytes) -> None:
    if arguments.json:
        _say(arguments, {"output": output.decode(errors="replace")}, "")
    else:
        sys.stdout.buffer.write(output)
        sys.stdout.flush()


def _events(client: Client, arguments: argparse.Namespace) -> None:
    for event in client.events():
        fields = {name: value for name, value in event.fields.items() if name != "id"}
        details = " ".join(
            f"{name}={value}" for name, value in fields.items() if name not in {"event", "key"}
        )
        text = f"{time.strftime('%H:%M:%S')} {event.key} {event.name} {details}"
        _say(arguments, fields, text)


def _stop(client: Client, arguments: argparse.Namespace) -> None:
    client.stop(arguments.key)


def _start(client: Client, arguments: argparse.Namespace) -> None:
    launched = client.start(arguments.key)
    _say(arguments, {"key": launched.key, "pid": launched.pid}, f"pid {launched.pid}")


def _restart(client: Client, arguments: argparse.Namespace) -> None:
    _stop(client, arguments)
    _start(client, arguments)


def _signal(client: Client, arguments: argparse.Namespace) -> None:
    import signal

    name = arguments.signal.upper()
    if name.isdigit():
        try:
            name = signal.Signals(int(name)).name
        except ValueError:
            raise SupervisorError("EINVAL", f"cannot signal: there is no signal {name}") from None
    client.signal(arguments.key, name if name.startswith("SIG") else f"SIG{name}")


def _wait(client: Client, arguments: argparse.Namespace) -> int:
    ended = client.wait(arguments.key)
    _say(arguments, {"status": ended.status, "code": ended.code}, f"{ended.status} {ended.code}")
    return ended.code if ended.status == "exited" else 128 + ended.code


def _launch(client: Client, arguments: argparse.Namespace) -> int:
    launched = client.launch(
        arguments.argv,
        name=arguments.name,
        respawn=arguments.respawn,
        listen=arguments.listen,
        wait=arguments.wait,
    )
    if launched.exit is None:
        value = {"key": launched.key, "pid": launched.pid}
        _say(arguments, value, f"{launched.key} (pid {launched.pid})")
        return 0
    _offset, output = client.output(launched.key)
    if arguments.json:
        ended = {"key": launched.key, "status": launched.exit.status, "code": launched.exit.code}
        _say(arguments, {**ended, "output": output.decode(errors="replace")}, "")
    else:
        _print_output(arguments, output)
    return launched.exit.code if launched.exit.status == "exited" else 128 + launched.exit.code


def _upgrade(client: Client, _arguments: argparse.Namespace) -> None:
    client.request("upgrade")


def _shutdown(client: Client, _arguments: argparse.Namespace) -> None:
    client.shutdown("termina-ctl")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
