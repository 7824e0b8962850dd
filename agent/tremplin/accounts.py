"""The account files of a container as text: who is in them, and what they must say for the primary
user to be able to log in. Pure; set_up_user.py reads and writes the files themselves.

Lines that are not understood stay as they are. Sources: passwd(5), shadow(5), group(5), gshadow(5).
"""

from __future__ import annotations

import re
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PRIMARY_ID = 1000
"""The primary user's uid and, as a rule, gid."""

_SERVICE_ACCOUNTS = (
    ("chronos-access", 1001),
    ("android-everybody", 665357),
    ("android-root", 655360),
)
_OPTIONAL_GROUPS = (
    "audio", "cdrom", "dialout", "floppy", "kvm", "libvirt", "plugdev", "sudo", "users", "video",
)  # fmt: skip
_NOWHERE = "/nonexistent"
_LARGEST_ID = 2**32 - 2
_LONGEST_NAME = 256
_LONGEST_HOME = 1024
_USERNAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


class AccountError(Exception):
    """The accounts cannot be set up; str() says why and holds no person's name."""


class AccountFiles(NamedTuple):
    """The content of the four files; None for one that the container does without."""

    passwd: str
    group: str
    shadow: str | None
    gshadow: str | None


class User(NamedTuple):
    """An entry of passwd(5), as far as it is needed."""

    name: str
    uid: int
    gid: int
    home: str


class Plan(NamedTuple):
    """What the files should say, and whom they then have as the primary user."""

    files: AccountFiles
    user: User
    existed: bool
    """Whether the primary user was there before."""


def is_username(text: str) -> bool:
    """Whether text can be the name of a user: what useradd(8) allows, capitals and dots too."""
    return _USERNAME.fullmatch(text) is not None


def without_name(text: str, username: str) -> str:
    """Text with $USERNAME wherever the name of the person stands by itself."""
    if not username:
        return text
    inside = r"[A-Za-z0-9_-]"
    return re.sub(rf"(?<!{inside}){re.escape(username)}(?!{inside})", "$USERNAME", text)


def find_user(passwd: str, uid: int) -> User | None:
    """The first user with that uid. Raises AccountError: its name or home can be told to nobody."""
    user = next((user for user in _users(passwd) if user.uid == uid), None)
    if user is not None and not (
        user.name.isprintable()
        and user.home.isprintable()
        and len(user.name) <= _LONGEST_NAME
        and len(user.home) <= _LONGEST_HOME
    ):
        raise AccountError(f"the user with uid {uid} has a name or a home that cannot be used")
    return user


def plan(files: AccountFiles, username: str, *, shell: str, no_shell: str) -> Plan:
    """The accounts that the contract (docs/contract.md) has SetUpUser make.

    username: of the primary user, unless there is one already, who then keeps the name.
    shell, no_shell: programs in the container, for who may log in and for who may not.
    Raises AccountError.
    """
    if not is_username(username):
        raise AccountError("$USERNAME is not a user name")
    if not any(user.name == "root" and user.uid == 0 for user in _users(files.passwd)):
        raise AccountError("the container has no root user")
    primary = find_user(files.passwd, PRIMARY_ID)
    existed = primary is not None
    if primary is None:
        primary, files = _add_primary(files, username, shell)
    files = _add_group_password(files, primary.name)
    for name, number in _SERVICE_ACCOUNTS:
        files = _add_service_account(files, name, number, no_shell)
        files = _add_group_password(files, name)
    for name in [name for name, _ in _SERVICE_ACCOUNTS] + list(_OPTIONAL_GROUPS):
        files = _join(files, primary.name, name)
    return Plan(files, primary, existed)


def _add_primary(files: AccountFiles, username: str, shell: str) -> tuple[User, AccountFiles]:
    reserved = {name for name, _ in _SERVICE_ACCOUNTS}
    if username in reserved or any(user.name == username for user in _users(files.passwd)):
        raise AccountError("$USERNAME is the name of a system user")
    groups = dict(_groups(files.group))
    if PRIMARY_ID not in groups.values():
        if username in groups:
            raise AccountError("$USERNAME is the name of a system group")
        files = _add_group(files, username, PRIMARY_ID)
    user = User(username, PRIMARY_ID, PRIMARY_ID, f"/home/{username}")
    return user, _add_user(files, user, shell)


def _add_service_account(
    files: AccountFiles, name: str, number: int, no_shell: str
) -> AccountFiles:
    # A name or an id that somebody else has is left alone: the container was not made by us.
    groups = dict(_groups(files.group))
    if name not in groups and number not in groups.values():
        files = _add_group(files, name, number)
    users = list(_users(files.passwd))
    if not any(user.name == name or user.uid == number for user in users):
        files = _add_user(files, User(name, number, number, _NOWHERE), no_shell)
    return files


def _add_user(files: AccountFiles, user: User, shell: str) -> AccountFiles:
    # Without a date of the last change nobody is asked for a new password, whatever the clock says.
    password = "*" if files.shadow is None else "x"
    passwd = f"{user.name}:{password}:{user.uid}:{user.gid}::{user.home}:{shell}"
    shadow = files.shadow
    if shadow is not None and not _has_entry(shadow, user.name):
        shadow = _append(shadow, f"{user.name}:*::0:99999:7:::")
    return files._replace(passwd=_append(files.passwd, passwd), shadow=shadow)


def _add_group(files: AccountFiles, name: str, gid: int) -> AccountFiles:
    return files._replace(group=_append(files.group, f"{name}:x:{gid}:"))


def _add_group_password(files: AccountFiles, name: str) -> AccountFiles:
    # Apart from the group itself: a kill between the two files leaves one of them behind.
    gshadow = files.gshadow
    if gshadow is None or _has_entry(gshadow, name) or not _has_entry(files.group, name):
        return files
    return files._replace(gshadow=_append(gshadow, f"{name}:!::"))


def _join(files: AccountFiles, member: str, group: str) -> AccountFiles:
    gshadow = files.gshadow
    if gshadow is not None:
        gshadow = _add_member(gshadow, member, group)
    return files._replace(group=_add_member(files.group, member, group), gshadow=gshadow)


def _add_member(text: str, member: str, group: str) -> str:
    # group(5) and gshadow(5) both have four fields, the members in the last one.
    lines = text.split("\n")
    for index, line in enumerate(lines):
        fields = line.split(":")
        if len(fields) != 4 or fields[0] != group:
            continue
        members = [name for name in fields[3].split(",") if name]
        if member not in members:
            fields[3] = ",".join([*members, member])
            lines[index] = ":".join(fields)
    return "\n".join(lines)


def _append(text: str, entry: str) -> str:
    # Entries that begin with + or - refer to NIS: what comes after them would not count.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    end = next((i for i, line in enumerate(lines) if line.startswith(("+", "-"))), len(lines))
    return "\n".join([*lines[:end], entry, *lines[end:], ""])


def _has_entry(text: str, name: str) -> bool:
    return any(line.startswith(f"{name}:") for line in text.split("\n"))


def _users(passwd: str) -> Iterable[User]:
    for line in passwd.split("\n"):
        fields = line.split(":")
        if len(fields) == 7 and _is_id(fields[2]) and _is_id(fields[3]):
            yield User(fields[0], int(fields[2]), int(fields[3]), fields[5])


def _groups(group: str) -> Iterable[tuple[str, int]]:
    for line in group.split("\n"):
        fields = line.split(":")
        if len(fields) == 4 and _is_id(fields[2]):
            yield fields[0], int(fields[2])


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _LARGEST_ID
