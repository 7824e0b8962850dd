"""What a session runs, as whom, where and with which environment; and its start."""

from __future__ import annotations

import fcntl
import os
import pwd
import subprocess
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.pb import vsh_pb2

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TARGETS = frozenset({"", "vm", "vm_shell"})
_DEFAULT_SHELL = "/bin/sh"


class CommandError(Exception):
    """It cannot be run; str() is what the host is told."""


class Command:
    """What a SetupConnectionRequest asks for."""

    def __init__(self, request: vsh_pb2.SetupConnectionRequest) -> None:
        """Raises CommandError."""
        if request.target not in _TARGETS:
            raise CommandError(f'there is no target {request.target!r}; the VM itself is "vm"')
        try:
            self.user = pwd.getpwnam(request.user or "root")
        except (KeyError, ValueError):
            raise CommandError("there is no such user in the VM") from None
        shell = self.user.pw_shell or _DEFAULT_SHELL
        self.executable: str | None = None
        if request.argv:
            self.argv = list(request.argv)
        elif request.command:
            self.argv = [shell, "-c", request.command]
        else:
            self.executable, self.argv = shell, [f"-{os.path.basename(shell)}"]
        self.env = {
            "PATH": _PATH,
            "HOME": self.user.pw_dir,
            "USER": self.user.pw_name,
            "LOGNAME": self.user.pw_name,
            "SHELL": shell,
            **request.env,
        }
        self.cwd = _directory(request, self.user.pw_dir)

    def start(
        self, *, stdin: int, stdout: int, stderr: int, is_terminal: bool
    ) -> subprocess.Popen[bytes]:
        """Starts it in a session of its own. Raises CommandError.

        is_terminal: stdin is one, and becomes the session's.
        """

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        same = os.geteuid() == self.user.pw_uid
        try:
            return subprocess.Popen(
                self.argv,
                executable=self.executable,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
                # Safe, as this process has one thread.
                preexec_fn=take_terminal if is_terminal else None,  # noqa: PLW1509
                user=None if same else self.user.pw_uid,
                group=None if same else self.user.pw_gid,
                extra_groups=None if same else self._groups(),
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CommandError(f"cannot execute {self.argv[0]!r}: {why}") from None

    def _groups(self) -> list[int]:
        return os.getgrouplist(self.user.pw_name, self.user.pw_gid)


def _directory(request: vsh_pb2.SetupConnectionRequest, home: str) -> str:
    directory = request.cwd
    if not directory and request.cwd_pid > 0:
        directory = f"/proc/{request.cwd_pid}/cwd"
    if directory:
        if "\0" in directory or not os.path.isdir(directory):
            raise CommandError(f"there is no directory {directory!r} in the VM")
        return directory
    return home if os.path.isdir(home) else "/"
