"""The Linux system calls that Python has no function for, through ctypes: thin, one function each,
raising OSError with the errno. Shared by PID 1 (mounting, power-off), maitred (Mount) and tremplin.
Not for prctl(2), which has its own library.
"""

from __future__ import annotations

import ctypes
import os
import sys

_libc = ctypes.CDLL(None, use_errno=True)

# mount(2), linux/mount.h: those that are used here
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_SHARED = 1 << 20

# umount2(2), sys/mount.h
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# reboot(2), linux/reboot.h
_REBOOT_POWER_OFF = 0x4321FEDC
_REBOOT_CAD_OFF = 0x00000000

# openat2(2), linux/openat2.h; the C library has no function for it
_SYS_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10


def _check(result: int, *name: str) -> None:
    # name: of the file it was about, if it was.
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *name)


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """Mounts a filesystem, moves or changes a mount.

    source: device, directory or name; target: directory or file; fstype: "" for none;
    flags: MS_*; options: comma-separated, as the filesystem wants them.
    Raises OSError, its filename the target. Source: mount(2).
    """
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(fstype) if fstype else None,
        ctypes.c_ulong(flags),
        os.fsencode(options) if options else None,
    )
    _check(result, target)


def umount(target: str, flags: int = 0) -> None:
    """Unmounts: umount2(2). flags: MNT_*, UMOUNT_NOFOLLOW.

    Raises OSError, its filename the target.
    """
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def ioctl(descriptor: int, request: int, argument: bytes) -> bytes:
    """Has a device or file do something.

    The result is the argument, a structure, as the kernel left it. Unlike in fcntl.ioctl(), other
    threads run meanwhile however large it is. Raises OSError. Source: ioctl(2).
    """
    buffer = ctypes.create_string_buffer(argument, len(argument))
    _check(_libc.ioctl(ctypes.c_int(descriptor), ctypes.c_ulong(request), buffer))
    return buffer.raw


def open_in_root(root: int, path: str, flags: int) -> int:
    """Opens a file that is there as chroot(2) to a directory would: no link leads out. openat2(2).

    root: descriptor of the directory; flags: os.O_*. Raises OSError, its filename the path.
    """
    # struct open_how: flags, mode and resolve, 64 bits each.
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS
    how = b"".join(number.to_bytes(8, sys.byteorder) for number in (flags, 0, resolve))
    descriptor: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(root),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_char_p(how),
        ctypes.c_size_t(len(how)),
    )
    _check(descriptor, path)
    return descriptor


def syncfs(descriptor: int) -> None:
    """Writes out the filesystem that an open file is on. Raises OSError."""
    _check(_libc.syncfs(ctypes.c_int(descriptor)))


def sethostname(name: str) -> None:
    """Sets the host name of this UTS namespace. Raises OSError."""
    encoded = os.fsencode(name)
    _check(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))))


def setns(descriptor: int) -> None:
    """Moves the calling thread into the namespace of an open file of /proc/PID/ns.

    Raises OSError.
    """
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(0)))


def swapoff(path: str) -> None:
    """Stops swapping to path, a device or file. Raises OSError, its filename the path."""
    _check(_libc.swapoff(os.fsencode(path)), path)


def power_off() -> None:
    """Ends the machine, or the calling PID namespace: reboot(2). Does not sync.

    Raises OSError.
    """
    _check(_libc.reboot(ctypes.c_int(_REBOOT_POWER_OFF)))


def disable_ctrl_alt_del() -> None:
    """From now on Ctrl-Alt-Del sends SIGINT to PID 1. Raises OSError."""
    _check(_libc.reboot(ctypes.c_int(_REBOOT_CAD_OFF)))
