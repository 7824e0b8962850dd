"""Devices of the VM in containers: UpdateContainerDevices, and USB devices by their port."""

from __future__ import annotations

import glob
import os

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session

_NODES = {
    "MICROPHONE": "/dev/snd/pcmC*D*c",
    "CAMERA": "/dev/video*",
}
PREFIX = "vm-"
"""How the names of the devices begin that UpdateContainerDevices gives."""
_USB_PREFIX = "usb-port-"
_SYSFS_USB = "/sys/bus/usb/devices"


class DeviceError(Exception):
    """A device cannot be given or taken away; str() says why."""


async def update_devices(
    session: Session, container: str, updates: dict[str, int]
) -> dict[str, pb.UpdateContainerDevicesResponse.UpdateResult.ValueType]:
    """Gives the container devices of the VM, or takes them away: the result by name.

    updates: VmDeviceAction by name of VmDevice.
    """
    results = {}
    answers = pb.UpdateContainerDevicesResponse
    for name, action in sorted(updates.items()):
        nodes = sorted(glob.glob(_NODES[name])) if name in _NODES else []
        if name not in _NODES or (action == pb.ENABLE and not nodes):
            results[name] = answers.NO_SUCH_VM_DEVICE
            continue
        wanted = {
            f"{PREFIX}{name.lower()}-{os.path.basename(node)}": _character_device(node)
            for node in nodes
            if action == pb.ENABLE
        }
        try:
            await replace_devices(session, container, f"{PREFIX}{name.lower()}-", wanted)
        except LxdError:
            results[name] = answers.UPDATE_FAILED
        else:
            results[name] = answers.SUCCESS
    return results


async def replace_devices(
    session: Session, container: str, prefix: str, wanted: dict[str, dict[str, str]]
) -> None:
    """Makes wanted the container's devices whose name begins with prefix. Raises LxdError."""
    instance = await session.lxd.get("instances", container)
    devices = {k: v for k, v in instance["devices"].items() if not k.startswith(prefix)} | wanted
    if devices == instance["devices"]:
        return
    fields = ("architecture", "config", "description", "ephemeral", "profiles")
    body: dict[str, Any] = {key: instance[key] for key in fields} | {"devices": devices}
    await session.lxd_operations.run("put", "instances", container, json=body)


async def attach_usb(session: Session, container: str, port: int) -> None:
    """Gives a container the device at a port of the root hub. Raises DeviceError, LxdError."""
    node = usb_node(port)
    device = _character_device(node)
    name = f"{_USB_PREFIX}{port}:"
    await replace_devices(session, container, name, {name: device})


async def detach_usb(session: Session, port: int) -> None:
    """Takes the device at a port away from who has it. Raises DeviceError, LxdError."""
    name = f"{_USB_PREFIX}{port}:"
    holders = [
        instance["name"] for instance in await session.instances() if name in instance["devices"]
    ]
    if not holders:
        raise DeviceError("no container has it")
    for holder in holders:
        await replace_devices(session, holder, name, {})


def usb_node(port: int, *, sysfs: str = _SYSFS_USB) -> str:
    """The device node of the USB device at a port of the root hub. Raises DeviceError.

    Source: the kernel's Documentation/ABI/testing/sysfs-bus-usb; devices are named BUS-PORT.
    """
    for path in sorted(glob.glob(f"{sysfs}/*-{port}")):
        try:
            with open(f"{path}/busnum", encoding="ascii") as file:
                bus = int(file.read())
            with open(f"{path}/devnum", encoding="ascii") as file:
                device = int(file.read())
        except (OSError, ValueError):
            continue
        return f"/dev/bus/usb/{bus:03d}/{device:03d}"
    raise DeviceError(f"there is no USB device at port {port}")


def _character_device(node: str) -> dict[str, str]:
    return {"type": "unix-char", "source": node, "path": node, "mode": "0666", "required": "false"}
