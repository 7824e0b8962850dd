"""The Linux system calls that Python has no function for, through ctypes: thin, one function each,
raising OSError with the errno. Shared by PID 1 (mounting, power-off), maitred (Mount) and tremplin.
Not for prctl(2), which has its own library.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

# mount(2), linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_POSIXACL = 1 << 16
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

# umount2(2), sys/mount.h
MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

# reboot(2), linux/reboot.h
_REBOOT_POWER_OFF = 0x4321FEDC
_REBOOT_RESTART = 0x01234567
_REBOOT_CAD_OFF = 0x00000000


def _check(result: int, *names: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        # OSError(errno, text, name, winerror, name2)
        raise OSError(
            number, os.strerror(number), *names[:1], *((None, names[1]) if names[1:] else ())
        )


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """Mounts a filesystem; see the manual page mount in section 2.

    source: device, directory or name; target: directory or file; fstype: "" for none;
    flags: MS_*; options: comma-separated, as the filesystem wants them.
    Raises OSError, its filename the target.
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
    """Has a device or file do something; see the manual page in section 2.

    The result is the argument, a structure, as the kernel left it. Unlike in fcntl.ioctl(), other
    threads run meanwhile however large it is. Raises OSError.
    """
    buffer = ctypes.create_string_buffer(argument, len(argument))
    result = _libc.ioctl(ctypes.c_int(descriptor), ctypes.c_ulong(request), buffer)
    if result < 0:
        _check(result)
    return buffer.raw


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


def pivot_root(new_root: str, put_old: str) -> None:
    """Makes new_root the root and puts the old one at put_old. Raises OSError with both names."""
    _check(_libc.pivot_root(os.fsencode(new_root), os.fsencode(put_old)), new_root, put_old)


def power_off() -> None:
    """Ends the machine, or the calling PID namespace: reboot(2). Does not sync.

    Raises OSError.
    """
    _check(_libc.reboot(ctypes.c_int(_REBOOT_POWER_OFF)))


def restart() -> None:
    """Boots the machine again: reboot(2). Does not sync. Raises OSError."""
    _check(_libc.reboot(ctypes.c_int(_REBOOT_RESTART)))


def disable_ctrl_alt_del() -> None:
    """From now on Ctrl-Alt-Del sends SIGINT to PID 1. Raises OSError."""
    _check(_libc.reboot(ctypes.c_int(_REBOOT_CAD_OFF)))
