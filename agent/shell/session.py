"""One session of the remote shell: a connection of the host's, a process, and what goes between.

setup ──request──▶ running ──exit──▶ ended
  └──────bad────────┴──the host vanishes──▶ ended, and so is everything in the session
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import select
import signal
import struct
import termios

from google.protobuf.message import DecodeError

from agent import relay
from agent.pb import vsh_pb2
from agent.shell.command import Command, CommandError
from agent.shell.frames import FrameError, FrameReader, frame, input_in, output_frames
from agent.shell.program_input import ProgramInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

_log = logging.getLogger(__name__)

_SETUP_SECONDS = 10.0
_HANG_UP_SECONDS = 2.0
"""What the processes of a session get between SIGHUP and SIGKILL when the host has vanished."""
_LOOK_AGAIN_SECONDS = 0.1
_LOOK_FOR_HOST_SECONDS = 1.0
_READ_MAX = 64 << 10
_LAST_READS = 16

_SIGNALS = {
    vsh_pb2.SIGNAL_HUP: signal.SIGHUP,
    vsh_pb2.SIGNAL_INT: signal.SIGINT,
    vsh_pb2.SIGNAL_QUIT: signal.SIGQUIT,
    vsh_pb2.SIGNAL_TERM: signal.SIGTERM,
}


class Session(asyncio.BufferedProtocol):
    """The server's end of one connection."""

    _transport: asyncio.Transport

    def __init__(self, sessions: set[Session], refusals: relay.RefusalLog) -> None:
        """sessions: where it is while it lives."""
        self._sessions = sessions
        self._refusals = refusals
        self._loop = asyncio.get_running_loop()
        self._frames = FrameReader()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._terminal = -1
        self._input: ProgramInput | None = None
        self._outputs: dict[int, vsh_pb2.StdioStream.ValueType] = {}
        self._is_paused = False
        self._is_lost = False
        self._ending: asyncio.Task[None] | None = None
        self._setup_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self.ended = self._loop.create_future()

    # ---- the connection -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sessions.add(self)
        if not relay.peer_is_allowed(transport.get_extra_info("socket")):
            self._refusals.refused(transport.get_extra_info("peername"))
            transport.abort()
            return
        self._setup_timer = self._loop.call_later(_SETUP_SECONDS, transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._frames.space()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message in self._frames.received(nbytes):
                if self._transport.is_closing():
                    return
                if self._input is None:
                    self._set_up(vsh_pb2.SetupConnectionRequest.FromString(bytes(message)))
                elif (data := input_in(message)) is not None:
                    self._input.put(data)
                else:
                    self._serve(vsh_pb2.GuestMessage.FromString(bytes(message)), self._input)
            if self._input is not None:
                self._input.write()
        except (FrameError, DecodeError) as error:
            _log.warning("cannot go on with a session: the host sent %s", error)
            self._transport.abort()
            return
        if self._input is not None and self._input.is_full:
            self._transport.pause_reading()
            if self._look_timer is None:
                self._look_later()

    def _resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        del error
        if self._setup_timer is not None:
            self._setup_timer.cancel()
        self._is_lost = True
        self._close_descriptors()
        process = self._process
        if process is None or process.returncode is not None:
            self._finish()
        else:
            self._ending = self._loop.create_task(self._end_processes(process.pid))

    def pause_writing(self) -> None:
        self._is_paused = True
        for descriptor in self._outputs:
            self._loop.remove_reader(descriptor)

    def resume_writing(self) -> None:
        self._is_paused = False
        for descriptor in self._outputs:
            self._loop.add_reader(descriptor, self._read_output, descriptor)

    def abort(self) -> None:
        """Ends the session as if the host had vanished."""
        self._transport.abort()

    # ---- messages of the host -----------------------------------------------------------------

    def _set_up(self, request: vsh_pb2.SetupConnectionRequest) -> None:
        if self._setup_timer is not None:
            self._setup_timer.cancel()
        try:
            command = Command(request)
            self._process = self._start(command, request)
        except (CommandError, OSError) as error:
            answer = vsh_pb2.SetupConnectionResponse(
                status=vsh_pb2.FAILED, description=str(error)[:1000]
            )
            self._transport.write(frame(answer))
            self._transport.close()
            return
        answer = vsh_pb2.SetupConnectionResponse(status=vsh_pb2.READY, pid=self._process.pid)
        self._transport.write(frame(answer))
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        if not self._is_paused:
            self.resume_writing()

    def _serve(self, message: vsh_pb2.GuestMessage, program: ProgramInput) -> None:
        kind = message.WhichOneof("msg")
        if kind == "data_message":
            if message.data_message.stream == vsh_pb2.STDIN_STREAM:
                program.put(message.data_message.data)
        elif kind == "resize_message":
            size = message.resize_message
            self._resize(size.rows, size.cols)
        elif kind == "signal":
            self._signal(message.signal)
        elif kind == "status_message":  # the host has had enough
            self._transport.abort()

    def _resize(self, rows: int, columns: int) -> None:
        if self._terminal < 0 or not (0 < rows < 1 << 16 and 0 < columns < 1 << 16):
            return
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def _signal(self, name: vsh_pb2.Signal.ValueType) -> None:
        number = _SIGNALS.get(name)
        if number is None or self._process is None:
            return
        group = self._process.pid
        try:
            if self._terminal >= 0:
                group = os.tcgetpgrp(self._terminal) or group
            os.killpg(group, number)
        except OSError as error:  # nobody is left to get it
            _log.debug("cannot signal a session: %s", error)

    # ---- the process --------------------------------------------------------------------------

    def _start(
        self, command: Command, request: vsh_pb2.SetupConnectionRequest
    ) -> subprocess.Popen[bytes]:
        theirs: list[int] = []
        try:
            if request.nopty:
                stdin, to_stdin = os.pipe2(os.O_CLOEXEC)
                theirs.append(stdin)
                self._take_input_at(to_stdin)
                for stream in (vsh_pb2.STDOUT_STREAM, vsh_pb2.STDERR_STREAM):
                    ours, end = os.pipe2(os.O_CLOEXEC)
                    theirs.append(end)
                    self._outputs[ours] = stream
                stdout, stderr = theirs[1:]
            else:
                self._terminal, slave = os.openpty()
                theirs.append(slave)
                to_stdin = self._terminal
                self._take_input_at(to_stdin)
                self._outputs[self._terminal] = vsh_pb2.STDOUT_STREAM
                os.fchown(slave, command.user.pw_uid, -1)
                self._resize(request.window_rows, request.window_cols)
                stdin = stdout = stderr = slave
            for descriptor in {to_stdin, *self._outputs}:
                os.set_blocking(descriptor, False)
            return command.start(
                stdin=stdin, stdout=stdout, stderr=stderr, is_terminal=not request.nopty
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def _take_input_at(self, descriptor: int) -> None:
        self._input = ProgramInput(
            descriptor, is_terminal=descriptor == self._terminal, on_room=self._resume_reading
        )

    def _read_output(self, descriptor: int) -> bool:
        """Passes on what there is; whether there may be more."""
        try:
            data = os.read(descriptor, _READ_MAX)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: nobody has the terminal open any more
                _log.warning("cannot read a session's output: %s", error.strerror)
            data = b""
        if not data:
            self._loop.remove_reader(descriptor)
            del self._outputs[descriptor]
            if descriptor != self._terminal:
                os.close(descriptor)
            return False
        self._transport.write(output_frames(self._outputs[descriptor], data))
        return True

    def _look_later(self) -> None:
        self._look_timer = self._loop.call_later(_LOOK_FOR_HOST_SECONDS, self._look_for_host)

    def _look_for_host(self) -> None:
        """While nothing is read, nobody notices that the host vanished."""
        self._look_timer = None
        if self._input is None or not self._input.is_full or self._transport.is_closing():
            return
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLRDHUP)
        if poll.poll(0):
            self._transport.abort()
        else:
            self._look_later()

    def _exited(self) -> None:
        assert self._process is not None
        self._loop.remove_reader(self._pidfd)
        code = self._process.wait()
        if self._is_lost:
            return  # _end_processes() sees to the rest
        # What it wrote last comes before the news of its end. What others still write is not
        # waited for, however much it is.
        for descriptor in list(self._outputs):
            for _ in range(_LAST_READS):
                if not self._read_output(descriptor):
                    break
        status = vsh_pb2.ConnectionStatusMessage(
            status=vsh_pb2.EXITED, code=code if code >= 0 else 128 - code
        )
        self._transport.write(frame(vsh_pb2.HostMessage(status_message=status)))
        self._transport.close()

    async def _end_processes(self, session: int) -> None:
        """Ends all that the session has started and that has not made itself independent of it."""
        deadline = self._loop.time() + _HANG_UP_SECONDS
        number = signal.SIGHUP
        while members := _members(session):
            if self._loop.time() >= deadline:
                number = signal.SIGKILL
            for pid in members:
                try:
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        self._finish()

    def _close_descriptors(self) -> None:
        if self._input is not None:
            self._input.close()
        descriptors = {self._terminal, *self._outputs} - {-1}
        self._terminal = -1
        self._outputs.clear()
        for descriptor in descriptors:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def _finish(self) -> None:
        if self._process is not None:
            self._process.wait()  # it has ended, but not everybody has noticed yet
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._sessions.discard(self)
        self.ended.set_result(None)


def _members(session: int) -> list[int]:
    """The processes of a session, those that are dead but not waited for left out: proc(5)."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in {b"Z", b"X"}:
            found.append(int(name))
    return found
