"""ConfigureContainerGuest: a VM that is itself the container gets the container's token."""

from __future__ import annotations

import pwd

from agent import atomic_file
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
    owner = (0, 0)
    if username:
        try:
            entry = pwd.getpwnam(username)
        except (KeyError, ValueError):  # ValueError: a NUL in it
            raise NotNow("cannot configure the guest: there is no user $USERNAME") from None
        owner = (entry.pw_uid, entry.pw_gid)
    try:
        atomic_file.replace(_TOKEN_FILE, token, mode=0o400, owner=owner)
    except OSError as error:
        raise Failed(f"cannot configure the guest: {error}") from None
