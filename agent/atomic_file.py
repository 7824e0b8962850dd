"""Files that are replaced as a whole: who reads one sees the old content or the new, whoever is
killed meanwhile. Nothing is flushed: a power cut may take either.
"""

from __future__ import annotations

import os


def replace(
    path: str, content: str, *, mode: int = 0o644, owner: tuple[int, int] | None = None
) -> None:
    """Makes content that of the file at path, which need not be there. Not for two at once.

    mode: of the new file, whatever the umask. owner: its uid and gid; None for the caller's.
    Raises OSError: what was there stays.
    """
    temporary = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    flags |= os.O_NONBLOCK  # an error, not a wait, for a FIFO
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            # Before there is anything to read in it.
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
