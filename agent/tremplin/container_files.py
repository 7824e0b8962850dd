"""The files of one container, running or not, through LXD's file interface (SFTP).

Ids and paths are the container's own; symbolic links are followed inside of it, never out of it.
Blocking: for a worker thread. One connection serves many requests.

Sources: LXD's /1.0/instances/NAME/sftp; draft-ietf-secsh-filexfer-02 (version 3 of the protocol);
posix-rename@openssh.com of OpenSSH's PROTOCOL file.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import time
from typing import NamedTuple
from urllib.parse import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_SECONDS = 60.0
"""What LXD has for all answers together. The container may hold up each: by a FIFO, or by a
filesystem of its own."""
_CHUNK = 32 * 1024
_LARGEST_FILE = 1024 * 1024
_LARGEST_DIRECTORY = 10_000
"""Files of a directory that are listed."""
_LARGEST_PACKET = 1024 * 1024

(_INIT, _VERSION, _OPEN, _CLOSE, _READ, _WRITE, _LSTAT) = range(1, 8)
(_SETSTAT, _OPENDIR, _READDIR, _REMOVE, _MKDIR, _RMDIR) = (9, 11, 12, 13, 14, 15)
(_STAT, _READLINK, _SYMLINK) = (17, 19, 20)
(_STATUS, _HANDLE, _DATA, _NAME, _ATTRS, _EXTENDED) = (101, 102, 103, 104, 105, 200)
(_OK, _EOF, _NO_SUCH_FILE, _PERMISSION_DENIED) = range(4)
(_HAS_SIZE, _HAS_OWNER, _HAS_MODE, _HAS_TIMES, _HAS_MORE) = (1, 2, 4, 8, 0x80000000)
(_FOR_READING, _FOR_WRITING, _CREATE, _EXCLUSIVE) = (1, 2, 8, 32)


class ClosedError(ConnectionError):
    """LXD refused or ended the connection, which may pass: it is busy with the container."""


class FileAttributes(NamedTuple):
    """What lstat(2) says, as far as it is needed."""

    mode: int
    uid: int
    gid: int
    size: int


class ContainerFiles:
    """`with ContainerFiles(socket_path, name) as files:`."""

    def __init__(self, socket_path: str, container: str) -> None:
        """socket_path: LXD's. Raises OSError: LXD does not give access to the files."""
        self._container = container
        self._number = 0
        self._left = _SECONDS
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_SECONDS)
            self._socket.connect(socket_path)
            self._stream = self._socket.makefile("rb")
            self._upgrade()
            self._send(_INIT, struct.pack(">I", 3))
            kind, _ = self._receive()
            if kind != _VERSION:
                raise ConnectionError("LXD's file interface speaks another protocol")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()
        self._socket.close()

    def read(self, path: str) -> bytes:
        """The content of a regular file. Raises OSError; FileNotFoundError."""
        found = self.stat(path)
        if found is not None and not stat.S_ISREG(found.mode):
            raise OSError(f"{path} is not a regular file")
        handle = self._handle(_OPEN, _text(path) + struct.pack(">II", _FOR_READING, 0), path)
        content = bytearray()
        try:
            while True:
                kind, body = self._ask(
                    _READ, _text(handle) + struct.pack(">QI", len(content), _CHUNK)
                )
                if kind == _DATA:
                    content += _string(body, 0)[0]
                    if len(content) > _LARGEST_FILE:
                        raise OSError(f"{path} is larger than {_LARGEST_FILE} bytes")
                elif self._end_of_file(kind, body, path):
                    return bytes(content)
        finally:
            self._ask(_CLOSE, _text(handle))

    def write(self, path: str, content: bytes, *, mode: int, uid: int, gid: int) -> None:
        """Makes a file. Raises OSError, also when something is there."""
        flags = _FOR_WRITING | _CREATE | _EXCLUSIVE
        handle = self._handle(_OPEN, _text(path) + struct.pack(">II", flags, 0), path)
        try:
            # Before there is anything to read in it.
            self.set_owner_and_mode(path, mode=mode, uid=uid, gid=gid)
            for offset in range(0, len(content), _CHUNK):
                chunk = content[offset : offset + _CHUNK]
                kind, body = self._ask(
                    _WRITE, _text(handle) + struct.pack(">Q", offset) + _text(chunk)
                )
                self._done(kind, body, path)
        finally:
            self._ask(_CLOSE, _text(handle))

    def lstat(self, path: str) -> FileAttributes | None:
        """What is at path, or None. Raises OSError."""
        return self._attributes(_LSTAT, path)

    def stat(self, path: str) -> FileAttributes | None:
        """What is at path, or where it leads to, or None. Raises OSError."""
        return self._attributes(_STAT, path)

    def list(self, path: str) -> list[tuple[str, FileAttributes]]:
        """Name and attributes of what a directory holds. Raises OSError; FileNotFoundError."""
        handle = self._handle(_OPENDIR, _text(path), path)
        found: list[tuple[str, FileAttributes]] = []
        try:
            while True:
                kind, body = self._ask(_READDIR, _text(handle))
                if kind != _NAME:
                    self._end_of_file(kind, body, path)
                    return sorted(found)
                (count,) = struct.unpack_from(">I", body)
                offset = 4
                for _ in range(count):
                    name, offset = _string(body, offset)
                    _, offset = _string(body, offset)
                    attributes, offset = _parse_attributes(body, offset)
                    if name not in {b".", b".."}:
                        found.append((os.fsdecode(name), attributes))
                if len(found) > _LARGEST_DIRECTORY:
                    raise OSError(f"{path} holds more than {_LARGEST_DIRECTORY} files")
        finally:
            self._ask(_CLOSE, _text(handle))

    def make_directory(self, path: str, *, mode: int, uid: int, gid: int) -> None:
        """Makes a directory. Raises OSError."""
        self._command(_MKDIR, _text(path) + struct.pack(">I", 0), path)
        self.set_owner_and_mode(path, mode=mode, uid=uid, gid=gid)

    def set_owner_and_mode(self, path: str, *, mode: int, uid: int, gid: int) -> None:
        """chown(2), then chmod(2), which chown would undo in part. Raises OSError."""
        self._command(_SETSTAT, _text(path) + struct.pack(">III", _HAS_OWNER, uid, gid), path)
        self._command(
            _SETSTAT, _text(path) + struct.pack(">II", _HAS_MODE, stat.S_IMODE(mode)), path
        )

    def read_link(self, path: str) -> str:
        """Where a symbolic link points to. Raises OSError."""
        kind, body = self._ask(_READLINK, _text(path))
        if kind != _NAME:
            self._done(kind, body, path)
        return os.fsdecode(_string(body, 4)[0])

    def make_link(self, path: str, target: str) -> None:
        """Makes a symbolic link at path. Raises OSError."""
        # The order of the arguments is OpenSSH's, which everybody follows.
        self._command(_SYMLINK, _text(target) + _text(path), path)

    def rename(self, old: str, new: str) -> None:
        """Renames a file; what is at new is replaced at once. Raises OSError."""
        self._command(_EXTENDED, _text("posix-rename@openssh.com") + _text(old) + _text(new), old)

    def remove(self, path: str) -> None:
        """Removes what is there, if anything, and what is in it. Raises OSError."""
        found = self.lstat(path)
        if found is None:
            return
        if not stat.S_ISDIR(found.mode):
            self._command(_REMOVE, _text(path), path)
            return
        directories = [path]
        while directories:
            last = directories[-1]
            for name, inside in self.list(last):
                if stat.S_ISDIR(inside.mode):
                    directories.append(f"{last}/{name}")
                else:
                    self._command(_REMOVE, _text(f"{last}/{name}"), path)
            if directories[-1] == last:
                self._command(_RMDIR, _text(directories.pop()), path)

    def _upgrade(self) -> None:
        name = quote(self._container, safe="")
        self._socket.sendall(
            f"GET /1.0/instances/{name}/sftp HTTP/1.1\r\n"
            "Host: lxd\r\nConnection: Upgrade\r\nUpgrade: sftp\r\n\r\n".encode()
        )
        status = self._stream.readline(4096).decode(errors="replace").strip()
        length = 0
        while (line := self._stream.readline(4096)) not in {b"\r\n", b""}:
            key, _, value = line.partition(b":")
            if key.lower() == b"content-length":
                length = min(int(value), _CHUNK)
        if " 101 " in status:
            return
        if " 404 " in status:
            raise ConnectionError("there is no such container")
        try:
            reason = json.loads(self._stream.read(length))["error"]
        except (ValueError, LookupError, TypeError):
            reason = status
        # A request that is wrong (4..) stays wrong; everything else may be LXD being busy.
        kind = ConnectionError if " 4" in status[:12] else ClosedError
        raise kind(f"LXD refuses its file interface: {reason}")

    def _send(self, kind: int, body: bytes) -> None:
        self._socket.sendall(struct.pack(">IB", len(body) + 1, kind) + body)

    def _receive(self) -> tuple[int, bytes]:
        head = self._stream.read(5)
        if len(head) < 5:
            raise ClosedError("LXD closed its file interface")
        length, kind = struct.unpack(">IB", head)
        if not 0 < length <= _LARGEST_PACKET:
            raise ConnectionError("LXD's file interface sends nonsense")
        body = self._stream.read(length - 1)
        if len(body) < length - 1:
            raise ClosedError("LXD closed its file interface")
        return kind, body

    def _ask(self, kind: int, body: bytes) -> tuple[int, bytes]:
        # One request at a time: the answer is the next packet.
        self._number += 1
        began = time.monotonic()
        try:
            self._socket.settimeout(max(self._left, 0.001))
            self._send(kind, struct.pack(">I", self._number) + body)
            answer, body = self._receive()
        except TimeoutError:
            raise TimeoutError("the container's files take too long") from None
        finally:
            self._left -= time.monotonic() - began
        if struct.unpack_from(">I", body)[0] != self._number:
            raise ConnectionError("LXD's file interface answers out of turn")
        return answer, body[4:]

    def _command(self, kind: int, body: bytes, path: str) -> None:
        self._done(*self._ask(kind, body), path)

    def _handle(self, kind: int, body: bytes, path: str) -> bytes:
        answer, body = self._ask(kind, body)
        if answer != _HANDLE:
            self._done(answer, body, path)
        return _string(body, 0)[0]

    def _attributes(self, kind: int, path: str) -> FileAttributes | None:
        answer, body = self._ask(kind, _text(path))
        if answer == _ATTRS:
            return _parse_attributes(body, 0)[0]
        try:
            self._done(answer, body, path)
        except FileNotFoundError:
            pass
        return None

    def _end_of_file(self, kind: int, body: bytes, path: str) -> bool:
        if kind == _STATUS and struct.unpack_from(">I", body)[0] == _EOF:
            return True
        self._done(kind, body, path)
        raise ConnectionError("LXD's file interface sends nonsense")

    @staticmethod
    def _done(kind: int, body: bytes, path: str) -> None:
        # The path stays out of the text of other errors: a person's name may be part of it.
        if kind != _STATUS:
            raise ConnectionError("LXD's file interface sends nonsense")
        (code,) = struct.unpack_from(">I", body)
        if code == _OK:
            return
        if code in {_NO_SUCH_FILE, _EOF}:
            raise FileNotFoundError(2, "No such file or directory", path)
        if code == _PERMISSION_DENIED:
            raise PermissionError(13, "Permission denied", path)
        raise OSError(os.fsdecode(_string(body, 4)[0]) or f"status {code} of the file interface")


def _text(value: str | bytes) -> bytes:
    raw = os.fsencode(value)
    return struct.pack(">I", len(raw)) + raw


def _string(body: bytes, offset: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from(">I", body, offset)
    start = offset + 4
    if start + length > len(body):
        raise ConnectionError("LXD's file interface sends nonsense")
    return body[start : start + length], start + length


def _parse_attributes(body: bytes, offset: int) -> tuple[FileAttributes, int]:
    (flags,) = struct.unpack_from(">I", body, offset)
    offset += 4
    size = uid = gid = mode = 0
    if flags & _HAS_SIZE:
        (size,) = struct.unpack_from(">Q", body, offset)
        offset += 8
    if flags & _HAS_OWNER:
        uid, gid = struct.unpack_from(">II", body, offset)
        offset += 8
    if flags & _HAS_MODE:
        (mode,) = struct.unpack_from(">I", body, offset)
        offset += 4
    if flags & _HAS_TIMES:
        offset += 8
    if flags & _HAS_MORE:
        (count,) = struct.unpack_from(">I", body, offset)
        offset += 4
        for _ in range(count):
            _, offset = _string(body, offset)
            _, offset = _string(body, offset)
    return FileAttributes(mode, uid, gid, size), offset
