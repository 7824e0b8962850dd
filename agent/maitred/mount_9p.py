"""Mount9P: a file server on a port of the host. The connection is made here and handed to the
kernel, whose 9p client knows no vsock (trans=fd, Documentation/filesystems/9p.rst).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os

from agent import relay, syscalls
from agent.options import HOST_CID, VsockAddress
from agent.places import open_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.pb import vm_guest_pb2

_log = logging.getLogger(__name__)

_PORT_MAX = 2**32 - 2
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV
_OPTIONS = "trans=fd,rfdno={0},wfdno={0},aname=/,cache=none,access=any,version=9p2000.L"


async def mount(request: vm_guest_pb2.Mount9PRequest, *, has_vsock: bool) -> int:
    """Mounts, and says so on the console. The result is 0 or the errno, as in MountResponse.

    has_vsock: whether this is a guest, and the host may be called over vsock.
    """
    what = f"9p of host port {request.port} at {request.target}"
    try:
        await _mount(request, has_vsock=has_vsock)
    except OSError as error:
        _log.warning("cannot mount %s: %s", what, error.strerror or error)
        return error.errno or errno.EIO
    _log.info("mounted %s", what)
    return 0


async def _mount(request: vm_guest_pb2.Mount9PRequest, *, has_vsock: bool) -> None:
    if not 1 <= request.port <= _PORT_MAX or "\0" in request.target:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if not has_vsock:
        raise OSError(errno.EAFNOSUPPORT, "maitred.listen is a unix socket, so there is no vsock")
    connection = await relay.connect(VsockAddress(request.port, HOST_CID))
    with connection:
        connection.setblocking(True)
        await asyncio.to_thread(_mount_connection, connection.fileno(), request.target)


def _mount_connection(descriptor: int, path: str) -> None:
    with open_place(path, create=True) as target:
        try:
            syscalls.mount("9p", target.path, "9p", _FLAGS, _OPTIONS.format(descriptor))
        except OSError:
            target.remove_what_was_made()
            raise
