"""Mount: mount(2) as the host asks for it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat

from agent import syscalls
from agent.maitred import block_device
from agent.maitred.errors import Failed
from agent.places import open_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.pb import vm_guest_pb2

_log = logging.getLogger(__name__)

_OPTIONS_MAX = 4095  # mount(2): a page with the NUL
_FSTYPE_MAX = 32


async def mount(request: vm_guest_pb2.MountRequest) -> int:
    """Mounts, and says so on the console. The result is 0 or the errno, as in MountResponse."""
    what = f"{request.source or 'none'} at {request.target}"
    try:
        check(request)
        if request.mkfs_if_needed:
            await _make_filesystem(request)
        await asyncio.to_thread(_mount, request)
    except Failed as error:
        _log.warning("cannot mount %s: %s", what, error)
        return errno.EIO
    except TimeoutError as error:
        _log.warning("cannot mount %s: %s", what, error)
        return errno.ETIMEDOUT
    except OSError as error:
        _log.warning("cannot mount %s: %s", what, error.strerror or error)
        return error.errno or errno.EIO
    _log.info("mounted %s", what)
    return 0


def check(request: vm_guest_pb2.MountRequest) -> None:
    """Raises OSError, with the errno that mount(2) has for such a request or would have."""
    words = (request.source, request.target, request.fstype, request.options)
    if any("\0" in word for word in words) or len(request.options.encode()) > _OPTIONS_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if not request.target:
        raise OSError(errno.ENOENT, "no target")
    if request.permissions & ~0o7777:
        raise OSError(errno.EINVAL, "permissions are more than mode bits")


async def _make_filesystem(request: vm_guest_pb2.MountRequest) -> None:
    fstype = request.fstype
    if not (fstype.isascii() and fstype.isalnum() and len(fstype) <= _FSTYPE_MAX):
        raise OSError(errno.ENODEV, "no filesystem has such a name")
    await block_device.wait_for(request.source, seconds=0)
    if not await block_device.content(request.source):
        await block_device.format_empty(request.source, fstype)
        _log.info("formatted %s as %s", request.source, fstype)


def _mount(request: vm_guest_pb2.MountRequest) -> None:
    is_file = bool(request.mountflags & syscalls.MS_BIND) and _is_file(request.source)
    with open_place(
        request.target,
        create=request.create_target,
        mode=request.permissions or 0o755,
        as_file=is_file,
    ) as target:
        try:
            syscalls.mount(
                request.source, target.path, request.fstype, request.mountflags, request.options
            )
        except OSError:
            target.remove_what_was_made()
            raise


def _is_file(path: str) -> bool:
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False
