"""Devices that appear while the VM runs, and options on its kernel command line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from agent.pb import vm_guest_pb2
from host.build_files import GuestImage
from host.commands import run_in_guest
from host.disks import DataDisk
from host.flows import network_order
from host.image_server import ImageServer
from host.qemu import Machine
from host.vm import Vm
from tests.vm.vms import boot, new_vm

pytestmark = pytest.mark.timeout(400)


_STARTUP_PORT = 7791


async def _move_startup_listener(vm: Vm) -> None:
    """From its usual port to the other one: nobody is told of VmReady at the usual one."""
    path = await vm.vsock.listen(_STARTUP_PORT)
    path.with_name(path.name.replace(str(_STARTUP_PORT), "7777")).rename(path)


def test_nic_and_disk_plugged_in_later(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """A NIC and a disk get their names and can be used, without a restart."""
    machine = Machine(
        spare_slots=2, words=("maitred.interface=eth1", f"maitred.listen_port={_STARTUP_PORT}")
    )
    network = vm_guest_pb2.NetworkConfigRequest(
        ipv4_config=vm_guest_pb2.IPv4Config(
            address=network_order("100.64.1.1"),
            gateway=network_order("100.64.1.2"),
            netmask=network_order("255.255.255.252"),
        )
    )

    async def scene() -> None:
        with DataDisk(tmp_path / "more.img").open(size=64 << 20) as more:
            async with new_vm(image, tmp_path, image_server, machine=machine) as test_vm:
                vm = test_vm.vm
                await _move_startup_listener(vm)
                await boot(vm)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await vm.maitred.ConfigureNetwork(network, timeout=20)
                assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
                async with vm.monitor() as monitor:
                    await monitor.run("netdev_add", type="user", id="net1", restrict=True)
                    await monitor.run(
                        "device_add",
                        driver="virtio-net-pci",
                        netdev="net1",
                        bus="slot0",
                        romfile="",
                    )
                    await monitor.run(
                        "blockdev-add",
                        **{"driver": "raw", "node-name": "more",
                           "file": {"driver": "file", "filename": str(more.path)}},
                    )  # fmt: skip
                    await monitor.run(
                        "device_add", driver="virtio-blk-pci", drive="more", bus="slot1"
                    )
                wait = (
                    "for n in $(seq 200); do test -e /sys/class/net/eth1 -a -b /dev/vde && exit 0; "
                    "sleep 0.1; done; ls /sys/class/net /dev/vd*; exit 1"
                )
                appeared = await run_in_guest(vm, ["/bin/sh", "-c", wait])
                assert appeared.code == 0, appeared.output
                await vm.maitred.ConfigureNetwork(network, timeout=20)
                routes = await run_in_guest(vm, ["ip", "-4", "route", "show", "dev", "eth1"])
                assert "default via 100.64.1.2" in routes.output
                assert "src 100.64.1.1" in routes.output
                made = await run_in_guest(vm, ["mkfs.ext4", "-q", "/dev/vde"])
                assert made.code == 0, made.errors
                mounted = await vm.maitred.Mount(
                    vm_guest_pb2.MountRequest(
                        source="/dev/vde", target="/mnt/more", fstype="ext4", create_target=True
                    ),
                    timeout=20,
                )
                assert mounted.error == 0
                found = await run_in_guest(vm, ["findmnt", "-no", "SOURCE", "/mnt/more"])
                assert found.output == "/dev/vde\n"
                assert await vm.shut_down(), vm.console.last_lines(20)

    runner.run(scene())
