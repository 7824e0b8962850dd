"""What LXD must be configured with before there are containers: pool, bridge, profile, settings.
Everything is compared with what is there first, so a second time changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat

from agent import mount_table
from agent.tremplin.lxd_client import LxdNotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session, Settings

_log = logging.getLogger(__name__)

NETWORK_DEVICE = "eth0"
"""The containers' network card, for LXD and inside."""

_MAPPED_IDS = (655360, 665357)
"""The uids and gids that are the same in the VM and in its containers, besides 1000 and 1001."""
_SERVER_CONFIG = {
    "images.auto_update_interval": "0",
    # Minutes that LXD, told to stop, waits for operations before it stops the containers. A login
    # is one, which ends with its container only.
    "core.shutdown_timeout": "0",
}
_POOL_CONFIG = {
    # LXD unpacks images and exported containers as root, with the device nodes that are in them,
    # and would let an unprivileged container open all it has a node of: the VM's disks, say.
    "btrfs.mount_options": "user_subvol_rm_allowed,nodev",
}


async def set_up_lxd(session: Session) -> None:
    """Brings LXD to the state of the contract, docs/contract.md. Raises LxdError."""
    await asyncio.gather(_set_up_server(session), _set_up_pool(session), _set_up_bridge(session))
    await _set_up_profile(session)


async def _set_up_server(session: Session) -> None:
    config = (await session.lxd.get())["config"]
    missing = {k: v for k, v in _SERVER_CONFIG.items() if config.get(k) != v}
    if missing:
        await session.lxd.request("patch", json={"config": missing})


async def _set_up_pool(session: Session) -> None:
    try:
        pool = await session.lxd.get("storage-pools", "default")
    except LxdNotFoundError:
        source = btrfs_source(session.settings)
        # LXD's directory on another filesystem, of a development machine: a btrfs in a file.
        config = _POOL_CONFIG if source is None else _POOL_CONFIG | {"source": source}
        await session.lxd.request(
            "post", "storage-pools", json={"name": "default", "driver": "btrfs", "config": config}
        )
        _log.info("LXD has its storage pool")
        return
    missing = {k: v for k, v in _POOL_CONFIG.items() if pool["config"].get(k) != v}
    if missing:
        await session.lxd.request("patch", "storage-pools", "default", json={"config": missing})


def btrfs_source(settings: Settings) -> str | None:
    """Where the storage pool is when LXD's directory is on a btrfs, which it is in the VM."""
    mount = mount_table.under(os.path.realpath(settings.lxd_dir))
    if mount is None or mount.fstype != "btrfs":
        return None
    return f"{settings.lxd_dir}/storage-pools/default"


async def _set_up_bridge(session: Session) -> None:
    wanted = {
        "ipv4.nat": "true",
        "ipv4.dhcp.expiry": "infinite",
        "ipv6.address": "none",
        "raw.dnsmasq": f"resolv-file={session.settings.resolv_conf}\ndhcp-authoritative\nno-ping",
    }
    if session.settings.lxd_subnet is not None:
        wanted["ipv4.address"] = session.settings.lxd_subnet
    if not await _has_bridge(session):
        await session.lxd.request(
            "post", "networks", json={"name": "lxdbr0", "type": "bridge", "config": wanted}
        )
        _log.info("LXD has its bridge")
        return
    config = (await session.lxd.get("networks", "lxdbr0"))["config"]
    changed = {k: v for k, v in wanted.items() if config.get(k) != v}
    if changed:
        await session.lxd.request("patch", "networks", "lxdbr0", json={"config": changed})
        _log.info("LXD's bridge has %s anew", ", ".join(sorted(changed)))


async def _has_bridge(session: Session) -> bool:
    try:
        bridge = await session.lxd.get("networks", "lxdbr0")
    except LxdNotFoundError:
        return False
    if bridge["managed"]:
        return True
    # Left by an LXD whose database is gone; its name server goes when the new one starts.
    process = await asyncio.create_subprocess_exec("ip", "link", "delete", "lxdbr0")
    await process.wait()
    return False


async def _set_up_profile(session: Session) -> None:
    wanted_config = {
        "boot.autostart": "false",
        "boot.host_shutdown_timeout": "9",
        # "both N N" would say the same, but then LXD 5.0.2 knows each of these ids twice, and its
        # file interface fails on a container that was started once and is stopped.
        "raw.idmap": "\n".join(
            f"{kind} {number} {number}" for number in _mappable_ids() for kind in ("uid", "gid")
        ),
        "security.nesting": "true",
    }
    wanted_devices = {
        "root": {"type": "disk", "path": "/", "pool": "default"},
        NETWORK_DEVICE: {
            "type": "nic",
            "name": NETWORK_DEVICE,
            "nictype": "bridged",
            "parent": "lxdbr0",
        },
        "fuse": _device("/dev/fuse"),
        "tun": _device("/dev/net/tun"),
    }
    if os.path.isdir(session.settings.shared_dir):
        wanted_devices["shared"] = {
            "type": "disk",
            "source": session.settings.shared_dir,
            "path": "/mnt/chromeos",
            # What the host mounts in there later shows up in running containers too.
            "recursive": "true",
            "propagation": "rslave",
            "required": "false",
        }
    else:
        _log.warning("containers have no /mnt/chromeos: no %s here", session.settings.shared_dir)
    profile = await session.lxd.get("profiles", "default")
    config = profile["config"] | wanted_config
    devices = profile["devices"] | wanted_devices
    if config != profile["config"] or devices != profile["devices"]:
        await session.lxd.request(
            "put",
            "profiles",
            "default",
            json={
                "config": config,
                "devices": devices,
                "description": profile.get("description", ""),
            },
        )
        _log.info("LXD has its profile")


def _device(path: str) -> dict[str, str]:
    device = {"type": "unix-char", "source": path, "path": path, "mode": "0666"}
    return device if _is_character_device(path) else device | {"required": "false"}


def _is_character_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def _mappable_ids() -> list[int]:
    allowed = [mappable_ids(_read(path)) for path in ("/etc/subuid", "/etc/subgid")]
    ids = [number for number in allowed[0] if number in allowed[1]]
    if len(ids) < 2 + len(_MAPPED_IDS):
        _log.warning("containers share only the ids %s with the VM: see /etc/subuid", ids)
    return ids


def mappable_ids(subids: str) -> list[int]:
    """Which of the ids that raw.idmap is to have root may map one by one.

    subids: the content of /etc/subuid or /etc/subgid. LXD takes the first large range of root's for
    its containers, and newuidmap(1) refuses what root does not have at all.
    Source: subuid(5); without any entry for root LXD does not ask these files.
    """
    ranges = []
    for line in subids.splitlines():
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in {"root", "0"} and fields[1].isdigit():
            ranges.append((int(fields[1]), int(fields[2] or 0)))
    wanted = [1000, 1001, *_MAPPED_IDS]
    if not ranges:
        return wanted
    single = [(start, count) for start, count in ranges if count < 65536]
    large = [(start, count) for start, count in ranges if count >= 65536]
    return [number for number in wanted if _within(number, single) and not _within(number, large)]


def _within(number: int, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= number < start + count for start, count in ranges)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
