"""Runs a command in the guest or in a container and brings back its output. LaunchProcess answers
with an exit code only, so the output takes the way over the serial console, encoded and numbered:
other programs and the kernel write there too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.pb import vm_guest_pb2
from host.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from host.vm import Vm

CALL_SECONDS = 20.0
"""The contract's deadline of Maitred's calls."""

LXC_ENVIRONMENT = {
    "LXD_DIR": "/mnt/stateful/lxd",
    "LXD_CONF": "/mnt/stateful/lxd_conf",
    "LXD_UNPRIVILEGED_ONLY": "true",
}

_TRIES = 3
_MARK = "output-"


@dataclass(frozen=True)
class Finished:
    """Exit code, stdout and stderr."""

    code: int
    output: str
    errors: str = ""


class GarbledError(Exception):
    """Some of the output was damaged on its way."""


def is_transfer(line: str) -> bool:
    """Whether a line of the console is a piece of some command's output on its way."""
    return re.match(rf"{_MARK}[0-9a-f]{{16}}:", line) is not None


def script(argv: Sequence[str], mark: str, *, directory: str = "/run") -> str:
    """A shell script that runs a command once and prints its output between marks.

    Lines on the console: `MARK:n:base64:` for n = 0, 1, …, then
    `MARK:end:lines:code:bytes of stdout:sha256:`.
    directory: where the output is kept, so that a second run prints it again.
    """
    file = f"{directory}/{mark}"
    # The end comes twice: it is what is waited for, and another's line may hit it as well.
    print_it = (
        f"cat {file} {file}.err | base64 -w 60 | {{ n=0; while read -r line; do "
        f"printf '\\n{mark}:%d:%s:\\n' $n \"$line\"; n=$((n + 1)); done; "
        f"sum=$(cat {file} {file}.err {file}.code | sha256sum); "
        f"code=$(cat {file}.code); size=$(stat -c %s {file}); "
        f"for _ in 1 2; do "
        f"printf '\\n{mark}:end:%d:%d:%d:%s:\\n' $n $code $size \"${{sum%% *}}\"; done; }}"
    )
    return (
        f"test -e {file}.code || {{ {shlex.join(argv)} </dev/null >{file} 2>{file}.err; "
        f"echo $? >{file}.code; }}\n{print_it}\n"
    )


def parse(text: str, mark: str) -> Finished:
    """What a script printed, from the console's text after the last `end` of it.

    Raises GarbledError when a line is missing or damaged.
    """
    ends = re.findall(rf"{mark}:end:(\d+):(\d+):(\d+):([0-9a-f]{{64}}):", text)
    if not ends:
        raise GarbledError
    lines, code, size, digest = ends[-1]
    pieces = dict(re.findall(rf"{mark}:(\d+):([A-Za-z0-9+/=]*):", text))
    try:
        data = b"".join(
            base64.b64decode(pieces[str(number)], validate=True) for number in range(int(lines))
        )
    except (KeyError, binascii.Error):
        raise GarbledError from None
    if hashlib.sha256(data + f"{code}\n".encode()).hexdigest() != digest:
        raise GarbledError
    output, errors = data[: int(size)], data[int(size) :]
    return Finished(int(code), output.decode(errors="replace"), errors.decode(errors="replace"))


def _forget(vm: Vm) -> str:
    """Shell commands that delete the output of earlier commands in the VM."""
    marks, vm.kept_output = vm.kept_output, set()
    return "".join(f"rm -f /run/{mark} /run/{mark}.*; " for mark in marks)


async def run_in_guest(
    vm: Vm, argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 60.0
) -> Finished:
    """Runs a command in the VM as root.

    env: added to the agent's own; timeout: seconds.
    Raises HostError when it cannot be launched or takes too long, VmDiedError.
    """
    mark = _MARK + secrets.token_hex(8)
    what = f"run {argv[0]} in the VM"
    for _ in range(_TRIES):
        start = vm.console.position
        launched = await vm.answer(
            vm.maitred.LaunchProcess(
                vm_guest_pb2.LaunchProcessRequest(
                    argv=["/bin/sh", "-c", _forget(vm) + script(argv, mark)],
                    env=env,
                    use_console=True,
                ),
                timeout=CALL_SECONDS,
                wait_for_ready=True,  # a maitred that has just died is started again
            ),
            timeout=CALL_SECONDS,
            what=what,
        )
        if launched.status != vm_guest_pb2.LAUNCHED:
            raise HostError(f"cannot {what}: the shell was not launched")
        # An end that other lines have damaged would be waited for in vain: any trace of one counts.
        await vm.alive(
            vm.console.wait_for(rf"{mark}:end:.*\n", start=start), timeout=timeout, what=what
        )
        try:
            finished = parse(vm.console.since(start), mark)
            vm.kept_output.add(mark)
            return finished
        except GarbledError:
            continue  # the output is kept in a file there: print it again
    raise HostError(f"cannot {what}: its output was garbled on the console {_TRIES} times")


async def run_in_container(
    vm: Vm, container: str, argv: Sequence[str], *, user: str = "root", timeout: float = 60.0
) -> Finished:
    """Runs a command in a container.

    user: who runs it, with that user's groups.
    Raises HostError, VmDiedError.
    """
    if user != "root":
        argv = ["su", "-s", "/bin/sh", user, "-c", shlex.join(argv)]
    return await run_in_guest(
        vm,
        ["/usr/bin/lxc", "exec", container, "--", *argv],
        env=LXC_ENVIRONMENT,
        timeout=timeout,
    )
