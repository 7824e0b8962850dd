"""USB devices that appear while the VM runs, given to a container: `make test-generic`. Debian's
cloud kernel, which the other tests boot, has no USB: with it, this is skipped.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.pb import tremplin_pb2 as pb
from host.build_files import GuestImage
from host.commands import run_in_container
from host.image_server import ImageServer
from host.qemu import Machine
from host.vm import Vm
from tests.vm.vms import is_generic, new_vm, output_of

pytestmark = pytest.mark.timeout(240)

_PORT = 2
_DESCRIPTOR = "head -c 12 {} | od -An -tx2 -j8"
"""idVendor and idProduct, which follow 8 other bytes in a device descriptor (USB 2.0, 9.6.1)."""
_TABLET, _WACOM = "0627 0001", "056a 0000"


async def _plug(vm: Vm, driver: str, name: str) -> str:
    """The node of a new device, once it is there."""
    async with vm.monitor() as monitor:
        await monitor.run("device_add", driver=driver, id=name, bus="usb.0", port=str(_PORT))
    return await _wait(vm, f"test -e /sys/bus/usb/devices/1-{_PORT}/devnum")


async def _unplug(vm: Vm, name: str) -> None:
    async with vm.monitor() as monitor:
        await monitor.run("device_del", id=name)
    await _wait(vm, f"test ! -e /sys/bus/usb/devices/1-{_PORT}")


async def _wait(vm: Vm, condition: str) -> str:
    found = f"/sys/bus/usb/devices/1-{_PORT}"
    script = (
        f"n=0; until {condition}; do n=$((n + 1)); [ $n -lt 200 ] || exit 1; sleep 0.1; done; "
        f"printf /dev/bus/usb/%03d/%03d $(cat {found}/busnum {found}/devnum 2>/dev/null)"
    )
    return await output_of(vm, "/bin/sh", "-c", script)


def test_a_usb_device_of_a_container(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    if not is_generic(image.kernel):
        pytest.skip("this kernel has no USB; `make test-generic` builds a guest that has")

    async def in_container(vm: Vm, script: str) -> str:
        done = await run_in_container(vm, "penguin", ["/bin/sh", "-c", script])
        assert done.code == 0, done
        return str(done.output)

    async def scene() -> None:
        machine = Machine(usb=True)
        async with new_vm(image, tmp_path, image_server, machine=machine) as test_vm:
            await test_vm.bring_up()
            vm = test_vm.vm
            tremplin = vm.tremplin
            await output_of(vm, "modprobe", "xhci_pci")

            node = await _plug(vm, "usb-tablet", "first")
            attach = pb.AttachUsbToContainerRequest(port_num=_PORT, container_name="penguin")
            answer = await tremplin.AttachUsbToContainer(attach, timeout=60)
            assert answer.status == pb.AttachUsbToContainerResponse.OK, answer
            assert (await in_container(vm, _DESCRIPTOR.format(node))).strip() == _TABLET

            # Another device at the same port has another node.
            await _unplug(vm, "first")
            other = await _plug(vm, "usb-wacom-tablet", "second")
            assert other != node
            answer = await tremplin.AttachUsbToContainer(attach, timeout=60)
            assert answer.status == pb.AttachUsbToContainerResponse.OK, answer
            assert (await in_container(vm, _DESCRIPTOR.format(other))).strip() == _WACOM
            assert await in_container(vm, f"test ! -e {node} && echo gone") == "gone\n"

            detach = pb.DetachUsbFromContainerRequest(port_num=_PORT)
            gone = await tremplin.DetachUsbFromContainer(detach, timeout=60)
            assert gone.status == pb.DetachUsbFromContainerResponse.OK, gone
            assert await in_container(vm, f"test ! -e {other} && echo gone") == "gone\n"
            gone = await tremplin.DetachUsbFromContainer(detach, timeout=60)
            assert gone.status == pb.DetachUsbFromContainerResponse.FAILED

            # A container that has a device which is no more there starts all the same.
            answer = await tremplin.AttachUsbToContainer(attach, timeout=60)
            assert answer.status == pb.AttachUsbToContainerResponse.OK, answer
            await _unplug(vm, "second")
            stop = pb.StopContainerRequest(container_name="penguin")
            stopped = await tremplin.StopContainer(stop, timeout=60)
            assert not stopped.failure_reason, stopped
            start = pb.StartContainerRequest(container_name="penguin")
            started = await tremplin.StartContainer(start, timeout=60)
            assert not started.failure_reason, started
            # Answered when it is up, however long the start went on after its own answer.
            while started.status != pb.StartContainerResponse.RUNNING:
                started = await tremplin.StartContainer(start, timeout=60)
                assert not started.failure_reason, started
            assert await vm.shut_down(), vm.console.last_lines(20)

    runner.run(scene())
