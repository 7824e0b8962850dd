"""PID 1 in the VM: what it can only do there. One boot without the flow."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from pathlib import Path

import pytest

from host.build_files import GuestImage
from host.image_server import ImageServer
from tests.vm.vms import boot, new_vm, output_of

pytestmark = pytest.mark.timeout(240)

_LIMITED = """
from agent.process_supervisor.client import Client
with Client.connect("/run/maitred") as client:
    hog = client.launch(["python3", "-c", "bytearray(200000000)"], memory_max=50000000, wait=True)
    script = "for i in 1 2 3 4 5 6; do sleep 0.1 & done; wait"
    forks = client.launch(["sh", "-c", script], pids_max=4, wait=True)
    group = client.launch(["cat", "/proc/self/cgroup"], name="g", pids_max=4, wait=True)
    print(hog.exit, forks.exit, client.output(forks.key)[1], client.output("g")[1].decode())
"""

_UPGRADE = """
from agent.process_supervisor.client import Client
with Client.connect("/run/maitred") as client:
    client.launch(["sleep", "1000"], name="kept", respawn=True)
    before = client.info("kept"), client.info("maitred")
    client.request("upgrade")
    after = client.info("kept"), client.info("maitred")
    print([row["pid"] for row in before] == [row["pid"] for row in after])
    print(client.request("list")["supervisor"]["upgrades"])
"""


def test_pid_1_in_the_vm(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            vm = test_vm.vm
            await boot(vm)
            guest = functools.partial(output_of, vm)

            rows = [
                json.loads(line) for line in (await guest("termina-ctl", "--json")).splitlines()
            ]
            assert "maitred" in {row["key"] for row in rows}
            assert "running (respawn)" in await guest("termina-ctl", "list")
            (maitred,) = (row for row in rows if row["key"] == "maitred")
            # Its first run was started before PID 1 itself was there.
            command = await guest("cat", f"/proc/{maitred['pid']}/cmdline")
            assert command.split("\0")[-2:] == ["--prepared", ""]
            limits = await guest("cat", f"/proc/{maitred['pid']}/limits")
            assert re.search(r"Max open files\s+1048576\s+1048576", limits)

            limited = await guest("python3", "-I", "-c", _LIMITED)
            assert limited.startswith(
                "signaled 9 exited 2 b'sh: 0: Cannot fork\\n' 0::/supervised/"
            )
            assert (
                await guest("find", "/sys/fs/cgroup/supervised", "-mindepth", "1", "-type", "d")
                == ""
            )

            assert (await guest("python3", "-I", "-c", _UPGRADE)).split() == ["True", "1"]
            script = "dd if=/dev/zero of=/var/d bs=1M count=32 status=none; mkfs.ext4 -q /var/d"
            await guest("sh", "-c", f"{script}; mkdir /mnt/d; mount -o loop /var/d /mnt/d")
            assert await vm.shut_down()
            assert "maitred: power off: clean" in vm.boot_text
            assert "Traceback" not in vm.boot_text

    runner.run(scenario())
