"""Mount9P against a real 9P server behind vsock: `make test-generic`. Debian's cloud kernel, which
the other tests boot, has no 9p: with it, this is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.pb import vm_guest_pb2
from host.build_files import GuestImage
from host.image_server import ImageServer
from host.vm import Vm
from tests.vm.vms import boot, is_generic, new_vm, output_of

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("diod") is None, reason="no diod, a 9P server, is installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the server gets a root directory of its own"),
]

_PORT = 5640
_TARGET = "/mnt/shared9"
_BIG = 16 << 20

# What the server serves as / is its root directory, and not this machine's. It does not cross
# mounts, so the files are in that directory itself.
_SERVE = r"""
mount --bind "$2" "$1"
mkdir -p "$1/usr" "$1/dev" "$1/etc"
for link in lib lib64 sbin bin; do ln -sfn "usr/$link" "$1/$link"; done
mount --bind -o ro /usr "$1/usr"
touch "$1/dev/null" "$1/etc/diod.conf"
echo 'nobody:x:65534:65534::/:/bin/false' >"$1/etc/passwd"
printf 'nogroup:x:65534:\nroot:x:0:nobody\n' >"$1/etc/group"
mount --bind /dev/null "$1/dev/null"
exec chroot "$1" /usr/sbin/diod -f -n --rfdno "$3" --wfdno "$3" -e / -L stderr
"""


class _FileServer:
    """A 9P server for each connection to a port of the host."""

    def __init__(self, root: Path, shared: Path) -> None:
        """root: an empty directory; shared: what is served."""
        self._words = ("-m", "sh", "-e", "-c", _SERVE, "sh", str(root), str(shared))
        self._servers: list[asyncio.subprocess.Process] = []

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        """Serves at this unix socket."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.setblocking(False)
            listener.bind(str(path))
            listener.listen()
            accepting = asyncio.create_task(self._accept(listener))
            try:
                yield
            finally:
                accepting.cancel()
                await asyncio.gather(accepting, return_exceptions=True)
                await self.go_away()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            with peer:
                peer.setblocking(True)
                fd = peer.fileno()
                self._servers.append(
                    await asyncio.create_subprocess_exec(
                        "unshare", *self._words, str(fd), pass_fds=(fd,)
                    )
                )

    async def go_away(self) -> None:
        """Ends every server, as a host that crashes does."""
        while self._servers:
            server = self._servers.pop()
            with contextlib.suppress(ProcessLookupError):
                server.kill()
            await server.wait()


class _Scene:
    def __init__(self, runner: asyncio.Runner, vm: Vm, shared: Path, server: _FileServer) -> None:
        self.runner = runner
        self.vm = vm
        self.shared = shared
        self.server = server

    async def mount(self, target: str, *, port: int = _PORT) -> int:
        request = vm_guest_pb2.Mount9PRequest(port=port, target=target)
        return (await self.vm.maitred.Mount9P(request, timeout=30)).error

    async def sh(self, script: str) -> str:
        """What a script in the VM says; it must succeed."""
        return await output_of(self.vm, "sh", "-euc", script)


@pytest.fixture(scope="module")
def scene(
    runner: asyncio.Runner,
    image: GuestImage,
    image_server: ImageServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[_Scene]:
    """A VM, and a folder of the host that is mounted in it."""
    if not is_generic(image.kernel):
        pytest.skip("this kernel has no 9p; `make test-generic` builds a guest that has")
    directory = tmp_path_factory.mktemp("9p")
    root, shared = directory / "root", directory / "shared"
    root.mkdir()
    shared.mkdir()
    shared.chmod(0o777)  # diod serves as nobody
    server = _FileServer(root, shared)
    stack = contextlib.AsyncExitStack()

    async def start() -> _Scene:
        vm = (await stack.enter_async_context(new_vm(image, directory, image_server))).vm
        await boot(vm)
        await stack.enter_async_context(server.listening(await vm.vsock.listen(_PORT)))
        scene = _Scene(runner, vm, shared, server)
        assert await scene.mount(_TARGET) == 0, vm.console.last_lines(5)
        return scene

    try:
        yield runner.run(start())
    finally:
        runner.run(stack.aclose())


def test_files_are_read_and_written(scene: _Scene) -> None:
    """Made, appended to, renamed, deleted; by both sides, who see each other's changes at once."""
    (scene.shared / "greeting").write_text("hello guest")

    async def scenario() -> None:
        said = await scene.sh(
            f"cd {_TARGET}; cat greeting; echo hello host >answer; echo again >>answer;"
            "mkdir folder; echo x >folder/a; mv folder/a folder/b; rm greeting;"
            "seq 300 | while read n; do : >folder/many-$n; done; ls folder | wc -l"
        )
        assert said == "hello guest301\n"

    scene.runner.run(scenario())
    assert (scene.shared / "answer").read_text() == "hello host\nagain\n"
    assert (scene.shared / "folder/b").read_text() == "x\n"
    assert not (scene.shared / "greeting").exists()


def test_big_files_arrive_whole(scene: _Scene) -> None:
    """Through the mount into the VM, and back to the host, several at a time."""
    data = os.urandom(_BIG)
    (scene.shared / "big").write_bytes(data)

    async def scenario() -> None:
        await scene.sh(
            f"cp {_TARGET}/big /run/big;"
            f"for n in 1 2 3; do dd if=/run/big of={_TARGET}/big$n bs=$((n * 77777)) status=none & "
            f"done; wait; rm /run/big"
        )

    scene.runner.run(scenario())
    for number in (1, 2, 3):
        assert (scene.shared / f"big{number}").read_bytes() == data


def test_a_planted_link_moves_no_mount(scene: _Scene) -> None:
    """A container may write to a shared folder; what it puts there leads no mount elsewhere."""
    link = f"{_TARGET}/link"

    async def scenario() -> None:
        await scene.sh(f"ln -s /etc {link}; mkdir {_TARGET}/real; ln -s real {_TARGET}/near")
        for target in (link, f"{link}/maitred", f"{_TARGET}/near"):
            assert errno.errorcode[await scene.mount(target)] == "ELOOP"
            bind = vm_guest_pb2.MountRequest(source="/opt", target=target, mountflags=4096)
            answer = await scene.vm.maitred.Mount(bind, timeout=20)
            assert errno.errorcode[answer.error] == "ELOOP"
        mounts = await scene.sh("grep -c ' 9p ' /proc/mounts")
        assert mounts == "1\n"
        assert await scene.mount(f"{_TARGET}/real") == 0
        assert await scene.sh(f"ls -d {_TARGET}/real/real; umount {_TARGET}/real") != ""

    scene.runner.run(scenario())


def test_a_port_where_nobody_listens(scene: _Scene) -> None:
    """Is an errno, and the directory that was made for it is gone."""

    async def scenario() -> None:
        error = await scene.mount("/mnt/nobody", port=_PORT + 1)
        assert errno.errorcode[error] in {"ETIMEDOUT", "ECONNRESET", "ECONNREFUSED"}
        assert errno.errorcode[await scene.mount("/mnt/nobody", port=0)] == "EINVAL"
        assert errno.errorcode[await scene.mount("mnt/nobody")] == "EINVAL"
        await scene.sh("test ! -e /mnt/nobody")

    scene.runner.run(scenario())


def test_a_file_server_that_went_away(scene: _Scene) -> None:
    """Programs get an error instead of waiting; it can be mounted anew; the VM ends cleanly."""
    (scene.shared / "kept").write_text("still here")

    async def scenario() -> None:
        await scene.server.go_away()
        said = await scene.sh(f"cat {_TARGET}/kept 2>&1 || true")
        assert "Input/output error" in said
        await scene.sh(f"umount {_TARGET}")
        assert await scene.mount(_TARGET) == 0
        assert await scene.sh(f"cat {_TARGET}/kept") == "still here"
        await scene.server.go_away()
        assert await scene.vm.shut_down(), scene.vm.console.last_lines(20)

    scene.runner.run(scenario())
