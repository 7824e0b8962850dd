"""SetUpUser and GetContainerUsername: the accounts in a container's files. Blocking: for a worker
thread. What the files should say is for accounts.py.

A kill at any moment leaves each file old or new, never in between, and passwd is the last one: the
primary user appears when everything else is there, and what is missing is made the next time.
"""

from __future__ import annotations

import contextlib
import posixpath
import stat

import tenacity

from agent.tremplin.accounts import (
    PRIMARY_ID,
    AccountError,
    AccountFiles,
    Plan,
    User,
    find_user,
    plan,
    without_name,
)
from agent.tremplin.container_files import ClosedError, ContainerFiles

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHELLS = ("/bin/bash", "/bin/sh")
_NO_SHELLS = ("/usr/sbin/nologin", "/sbin/nologin", "/bin/false")
_LINGER = "/var/lib/systemd/linger"
_WRITE_ORDER = ("group", "gshadow", "shadow", "passwd")
_NEW = ".new-by-tremplin"
_LINKS = 16
"""How many symbolic links may lead to an account file."""

_RETRYING = tenacity.Retrying(
    # LXD shares one file server of a container among clients, and ends it with the last of them: a
    # client that comes while another, killed, goes is cut off; and while it renames a container, as
    # it goes on to when tremplin was killed, it refuses. Every step can be done again.
    retry=tenacity.retry_if_exception_type(ClosedError),
    stop=tenacity.stop_after_attempt(10),
    wait=tenacity.wait_fixed(0.5),
    reraise=True,
)


@_RETRYING.wraps
def set_up_user(
    socket_path: str,
    container: str,
    username: str,
    *,
    flush: Callable[[], None],
) -> Plan:
    """Makes the accounts and the primary user's home, as far as they are missing.

    socket_path: LXD's. flush: puts what was written to the disk, before it takes its place.
    Raises AccountError, OSError; their text names no person but the one that was asked for.
    """
    with ContainerFiles(socket_path, container) as files:
        before = _read_accounts(files)
        wanted = plan(
            before,
            username,
            shell=_first_there(files, _SHELLS),
            no_shell=_first_there(files, _NO_SHELLS),
        )
        with _nameless(wanted.user.name):
            _make_home(files, wanted.user)
            _make_linger(files, wanted.user)
        changed = [
            name for name in _WRITE_ORDER if getattr(before, name) != getattr(wanted.files, name)
        ]
        places = [_write_beside(files, name, getattr(wanted.files, name)) for name in changed]
        flush()
        for place in places:
            files.rename(place + _NEW, place)
        return wanted


@_RETRYING.wraps
def read_primary_user(socket_path: str, container: str) -> User | None:
    """The container's user with uid 1000. Raises AccountError, OSError."""
    with ContainerFiles(socket_path, container) as files:
        return find_user(_decode(files.read("/etc/passwd")), PRIMARY_ID)


@contextlib.contextmanager
def _nameless(name: str) -> Iterator[None]:
    # The paths of homes are full of names, and a user that was there has another than the host's.
    try:
        yield
    except ClosedError:
        raise
    except OSError as error:
        raise AccountError(without_name(str(error), name)) from None


def _read_accounts(files: ContainerFiles) -> AccountFiles:
    texts: dict[str, str | None] = {}
    for name in AccountFiles._fields:
        try:
            texts[name] = _decode(files.read(f"/etc/{name}"))
        except FileNotFoundError:
            texts[name] = None
    passwd, group = texts["passwd"], texts["group"]
    if passwd is None or group is None:
        raise AccountError("the container has no /etc/passwd or no /etc/group")
    return AccountFiles(passwd, group, texts["shadow"], texts["gshadow"])


def _write_beside(files: ContainerFiles, name: str, text: str) -> str:
    place = _follow(files, f"/etc/{name}")
    found = files.lstat(place)
    if found is None:
        raise AccountError(f"/etc/{name} is gone")
    files.remove(place + _NEW)
    files.write(place + _NEW, _encode(text), mode=found.mode, uid=found.uid, gid=found.gid)
    return place


def _follow(files: ContainerFiles, path: str) -> str:
    for _ in range(_LINKS):
        found = files.lstat(path)
        if found is None or not stat.S_ISLNK(found.mode):
            return path
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), files.read_link(path)))
    raise AccountError(f"too many symbolic links lead to {path}")


def _first_there(files: ContainerFiles, programs: tuple[str, ...]) -> str:
    return next((path for path in programs if files.stat(path)), programs[-1])


def _make_home(files: ContainerFiles, user: User) -> None:
    if not user.home.startswith("/") or files.stat(user.home) is not None:
        return
    parent = posixpath.dirname(user.home)
    _make_directories(files, parent)
    new = f"{parent}/{_NEW}"
    files.remove(new)
    files.make_directory(new, mode=0o755, uid=user.uid, gid=user.gid)
    if files.stat("/etc/skel") is not None:
        _copy(files, "/etc/skel", new, user)
    files.rename(new, user.home)


def _copy(files: ContainerFiles, source: str, target: str, user: User) -> None:
    directories = [(source, target)]
    while directories:
        source, target = directories.pop()
        for name, found in files.list(source):
            old, new = f"{source}/{name}", f"{target}/{name}"
            if stat.S_ISLNK(found.mode):
                files.make_link(new, files.read_link(old))
            elif stat.S_ISDIR(found.mode):
                files.make_directory(new, mode=found.mode & 0o777, uid=user.uid, gid=user.gid)
                directories.append((old, new))
            elif stat.S_ISREG(found.mode):
                content = files.read(old)
                files.write(new, content, mode=found.mode & 0o777, uid=user.uid, gid=user.gid)


def _make_linger(files: ContainerFiles, user: User) -> None:
    # systemd-logind(8): a file here starts the user's own services when the container starts.
    _make_directories(files, _LINGER)
    if files.lstat(f"{_LINGER}/{user.name}") is None:
        files.write(f"{_LINGER}/{user.name}", b"", mode=0o644, uid=0, gid=0)


def _make_directories(files: ContainerFiles, path: str) -> None:
    missing = []
    while path != "/" and files.stat(path) is None:
        missing.append(path)
        path = posixpath.dirname(path)
    for directory in reversed(missing):
        files.make_directory(directory, mode=0o755, uid=0, gid=0)


def _decode(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
