"""Finds the place that a path of the host's names, to mount, read or write there, without being led
elsewhere by a symbolic link that a container put under a folder it can write to.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_LINKS_MAX = 40  # as in the kernel, path_resolution(7)


class Place:
    """An opened directory or file. Hold it while path is used, which names this very object."""

    def __init__(self) -> None:
        self.descriptor = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        """An O_PATH descriptor of it."""
        self._made: list[tuple[int, str, bool]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
        for parent, _name, _is_file in self._made:
            os.close(parent)

    @property
    def path(self) -> str:
        """Names it for system calls, whatever happens to the path it was found at."""
        return f"/proc/self/fd/{self.descriptor}"

    def remove_what_was_made(self) -> None:
        """Takes back the directories and the file that open_place() made, those that are empty."""
        for parent, name, is_file in reversed(self._made):
            try:
                if is_file:
                    os.unlink(name, dir_fd=parent)
                else:
                    os.rmdir(name, dir_fd=parent)
            except OSError:
                return

    def _step_to(self, descriptor: int) -> None:
        os.close(self.descriptor)
        self.descriptor = descriptor

    def _make(self, name: str, *, mode: int, as_file: bool) -> int:
        parent = self.descriptor
        try:
            if as_file:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o644, dir_fd=parent))
            else:
                os.mkdir(name, 0o700, dir_fd=parent)
                os.chmod(name, mode, dir_fd=parent)  # mkdir(2) minds the umask
            self._made.append((os.dup(parent), name, as_file))
        except FileExistsError:  # somebody else was faster; a link shows itself when it is opened
            pass
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)

    def _walk(self, path: str, *, create: bool, mode: int, as_file: bool) -> None:
        root_device = os.stat("/").st_dev
        names = _names(path)
        links = 0
        while names:
            name = names.pop(0)
            try:
                found = os.open(
                    name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.descriptor
                )
            except FileNotFoundError:
                if not create:
                    raise
                found = self._make(
                    name, mode=0o755 if names else mode, as_file=as_file and not names
                )
            status = os.stat(found)
            if not stat.S_ISLNK(status.st_mode):
                self._step_to(found)
                continue
            link = os.readlink("", dir_fd=found)
            os.close(found)
            links += 1
            if status.st_uid != 0 or status.st_dev != root_device or links > _LINKS_MAX:
                raise OSError(errno.ELOOP, "a symbolic link on the way is not followed", path)
            names = _names(link) + names
            if link.startswith("/"):
                self._step_to(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def open_place(
    path: str, *, create: bool = False, mode: int = 0o755, as_file: bool = False
) -> Place:
    """Opens what is at a path.

    path: absolute. A symbolic link on the way is followed only when it belongs to root and lies on
    the root filesystem, where no container can write.
    create: makes what is missing; mode: of the last directory made; as_file: make that one a file.
    Raises OSError: ELOOP for a link that is not followed, EINVAL for a path that is not absolute,
    else as open(2) and mkdir(2). Nothing that was made is then left behind.
    """
    if not path.startswith("/"):
        raise OSError(errno.EINVAL, "not an absolute path", path)
    target = Place()
    try:
        target._walk(path, create=create, mode=mode, as_file=as_file)
    except BaseException:
        target.remove_what_was_made()
        target.__exit__()
        raise
    return target


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in {"", "."}]
