"""ConfigureContainerGuest: a VM that is itself the container gets the container's token."""

from __future__ import annotations

import os
import pwd

from agent.maitred.errors import BadRequest, Failed, NotNow

_TOKEN_FILE = "/dev/.container_token"  # noqa: S105  # where programs in containers look
_TOKEN_MAX = 4096


def check(token: str) -> None:
    """Raises BadRequest."""
    if not token or len(token) > _TOKEN_MAX or not (token.isascii() and token.isprintable()):
        raise BadRequest("cannot configure the guest: that is not a container token")


def configure(token: str, username: str) -> None:
    """Writes the token where its user, and nobody else, can read it.

    username: a user of the VM; "" for root alone. Raises NotNow: no such user; Failed.
    """
    owner = group = 0
    if username:
        try:
            entry = pwd.getpwnam(username)
        except (KeyError, ValueError):  # ValueError: a NUL in it
            raise NotNow("cannot configure the guest: there is no user $USERNAME") from None
        owner, group = entry.pw_uid, entry.pw_gid
    temporary = f"{_TOKEN_FILE}.{os.getpid()}.new"
    try:
        descriptor = os.open(
            temporary,
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o400,
        )
        with open(descriptor, "w", encoding="ascii") as file:
            os.fchown(descriptor, owner, group)
            os.fchmod(descriptor, 0o400)
            file.write(token)
        os.replace(temporary, _TOKEN_FILE)
    except OSError as error:
        raise Failed(f"cannot configure the guest: {error}") from None
