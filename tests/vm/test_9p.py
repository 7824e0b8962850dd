"""Mount9P against a real 9P server behind vsock. Debian's cloud kernel has no 9p: with it, this is
skipped; `KERNEL=generic make image` builds a guest that has.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
from pathlib import Path

import pytest

from agent.pb import vm_guest_pb2
from host.build_files import GuestImage
from host.commands import run_in_guest
from host.image_server import ImageServer
from tests.vm.vms import boot, new_vm

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("diod") is None, reason="no diod, a 9P server, is installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the server gets a root directory of its own"),
]

_PORT = 5640

# What the server serves as / is its root directory, and not this machine's. It does not cross
# mounts, so the files are in that directory itself.
_SERVE = r"""
mount --bind "$2" "$1"
mkdir "$1/usr"
ln -s usr/lib usr/lib64 usr/sbin usr/bin "$1"
mount --bind -o ro /usr "$1/usr"
mkdir "$1/dev" "$1/etc"
touch "$1/dev/null" "$1/etc/diod.conf"
echo 'nobody:x:65534:65534::/:/bin/false' >"$1/etc/passwd"
printf 'nogroup:x:65534:\nroot:x:0:nobody\n' >"$1/etc/group"
mount --bind /dev/null "$1/dev/null"
exec chroot "$1" /usr/sbin/diod -f -n --rfdno "$3" --wfdno "$3" -e / -L stderr
"""


async def _serve(path: Path, root: Path, shared: Path) -> None:
    """A server for one connection to the unix socket at path."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen()
        peer, _ = await loop.sock_accept(listener)
    with peer:
        peer.setblocking(True)
        words = ("sh", "-e", "-c", _SERVE, "sh", str(root), str(shared), str(peer.fileno()))
        server = await asyncio.create_subprocess_exec(
            "unshare", "-m", *words, pass_fds=(peer.fileno(),)
        )
    try:
        await server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


def test_files_of_the_host(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """Read and written through the mount; a port where nobody listens is an errno."""
    root, shared = tmp_path / "root", tmp_path / "shared"
    root.mkdir()
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    (shared / "greeting").write_text("hello guest")

    async def scenario() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            vm = test_vm.vm
            await boot(vm)
            if (await run_in_guest(vm, ["modprobe", "9p"])).code != 0:
                pytest.skip("this kernel has no 9p")
            path = await vm.vsock.listen(_PORT)
            serving = asyncio.create_task(_serve(path, root, shared))
            target = "/mnt/shared9"
            mounted = await vm.maitred.Mount9P(
                vm_guest_pb2.Mount9PRequest(port=_PORT, target=target), timeout=30
            )
            assert mounted.error == 0, vm.console.last_lines(5)
            read = await run_in_guest(vm, ["cat", f"{target}/greeting"])
            assert read.output == "hello guest", read
            write = f"echo hello host >{target}/answer"
            done = await run_in_guest(vm, ["sh", "-c", write])
            assert done.code == 0, done
            assert (shared / "answer").read_text() == "hello host\n"
            assert (await run_in_guest(vm, ["umount", target])).code == 0
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            nobody = await vm.maitred.Mount9P(
                vm_guest_pb2.Mount9PRequest(port=_PORT + 1, target="/mnt/nobody"), timeout=30
            )
            assert errno.errorcode[nobody.error] in {"ETIMEDOUT", "ECONNRESET", "ECONNREFUSED"}
            assert (await run_in_guest(vm, ["test", "-e", "/mnt/nobody"])).code == 1

    runner.run(scenario())
