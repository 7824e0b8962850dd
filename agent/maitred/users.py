"""SetUpUser: a user of the VM itself, made with the tools of the system (useradd(8), usermod(8)).

Users of containers are tremplin's. Names of people are in no log and no reason.
"""

from __future__ import annotations

import grp
import pwd
import re

from agent.maitred.commands import run
from agent.maitred.errors import CallError, Failed
from agent.pb import vm_guest_pb2

_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")
_UID_MIN = 1000
_UID_MAX = 0xFFFFFFFE
_RESERVED_UIDS = frozenset({65534, 65535})  # nobody, and -1 of 16-bit ids
_GROUPS_MAX = 100
_ALIAS = "$USERNAME"

_UNLOGGED = ("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs tmpfs /dev; exec "$@"', "sh")
"""Runs a program that has no /dev/log, as these tell syslog(3) of each name; it needs nothing else
of /dev. The mount is seen by nobody else and ends with the program.
"""


async def set_up(request: vm_guest_pb2.SetUpUserRequest) -> vm_guest_pb2.SetUpUserResponse:
    """Creates the user, or adds the groups to one that is there. Failures are in the result.

    A user that has the uid already keeps its name, which is in the result. One call at a time.
    """
    response = vm_guest_pb2.SetUpUserResponse()
    try:
        _check(request)
        response.username = await _set_up(request)
        response.success = True
    except (CallError, OSError, TimeoutError) as error:
        reason = f"cannot set up the user: {error}"
        response.failure_reason = (
            reason.replace(request.username, _ALIAS) if request.username else reason
        )
    return response


def _check(request: vm_guest_pb2.SetUpUserRequest) -> None:
    if not _NAME.match(request.username):
        raise Failed("that is not a user name")
    if request.username == "root":
        raise Failed("root is no user to set up")
    if request.HasField("uid") and (
        not _UID_MIN <= request.uid <= _UID_MAX or request.uid in _RESERVED_UIDS
    ):
        raise Failed(f"uid {request.uid} is not for users")
    if len(request.group_names) > _GROUPS_MAX:
        raise Failed(f"more than {_GROUPS_MAX} groups")
    for name in request.group_names:
        try:
            if not _NAME.match(name):
                raise KeyError
            grp.getgrnam(name)
        except KeyError:
            raise Failed(f"there is no group {name[:40]!r}") from None


async def _set_up(request: vm_guest_pb2.SetUpUserRequest) -> str:
    groups = ",".join(dict.fromkeys(request.group_names))
    existing = _existing(request)
    if existing is None:
        argv = ["useradd", "--create-home", "--shell", "/bin/bash"]
        if request.HasField("uid"):
            argv += ["--uid", str(request.uid)]
        argv += ["--gid", request.username] if _has_group(request.username) else ["--user-group"]
        if groups:
            argv += ["--groups", groups]
        await _run(*argv, user=request.username)
        return request.username
    if groups:
        await _run("usermod", "--append", "--groups", groups, user=existing)
    return existing


def _existing(request: vm_guest_pb2.SetUpUserRequest) -> str | None:
    try:
        by_name = pwd.getpwnam(request.username)
    except KeyError:
        by_name = None
    if by_name is not None:
        if request.HasField("uid") and by_name.pw_uid != request.uid:
            raise Failed(f"{_ALIAS} is there with uid {by_name.pw_uid}, not {request.uid}")
        if by_name.pw_uid < _UID_MIN or by_name.pw_uid in _RESERVED_UIDS:
            raise Failed(f"{_ALIAS} is a user of the system")
        return by_name.pw_name
    if request.HasField("uid"):
        try:
            return pwd.getpwuid(request.uid).pw_name
        except KeyError:
            pass
    return None


def _has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


async def _run(*argv: str, user: str) -> None:
    done = await run(*_UNLOGGED, *argv, user)
    if done.code != 0:
        raise Failed(f"{argv[0]}: {done.reason}".replace(user, _ALIAS))
