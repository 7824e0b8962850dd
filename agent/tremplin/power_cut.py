"""What a power cut may have left torn in LXD's directory, and whose turn it is to put it right.

LXD writes most files without fsync(2), so the next boot may find them empty, cut off or not at all.
Whether something is of an earlier boot is not asked of the clock, which a host sets and which the
VM's hardware keeps to the second: everything is, as long as PID 1 has not started LXD.
"""

from __future__ import annotations

import os

_DOUBT = "tremplin-images-in-doubt"


def put_right(lxd_dir: str, run_dir: str) -> None:
    """Before LXD is started for the first time in this boot. Raises OSError."""
    _drop_torn_keys(lxd_dir)
    _drop_pid_files(lxd_dir)
    with open(f"{run_dir}/{_DOUBT}", "wb"):
        pass


def images_are_in_doubt(run_dir: str) -> bool:
    """Whether nobody has looked through LXD's images yet in this boot."""
    return os.path.exists(f"{run_dir}/{_DOUBT}")


def images_are_checked(run_dir: str) -> None:
    """What is there now is whole, or is being written. Raises OSError."""
    os.unlink(f"{run_dir}/{_DOUBT}")


def _drop_torn_keys(lxd_dir: str) -> None:
    # LXD makes its certificate and key anew when they are missing, and does not start when one of
    # them is torn.
    pair = [f"{lxd_dir}/server.crt", f"{lxd_dir}/server.key"]
    for path in pair:
        try:
            with open(path, "rb") as file:
                torn = b"-----END" not in file.read()
        except FileNotFoundError:
            continue
        if torn:
            for each in pair:
                try:
                    os.unlink(each)
                except FileNotFoundError:
                    pass
            return


def _drop_pid_files(lxd_dir: str) -> None:
    # No dnsmasq that LXD noted runs any more, and LXD does not get along with an empty file.
    networks = f"{lxd_dir}/networks"
    try:
        names = os.listdir(networks)
    except OSError:
        return
    for name in names:
        try:
            os.unlink(f"{networks}/{name}/dnsmasq.pid")
        except OSError:
            pass
