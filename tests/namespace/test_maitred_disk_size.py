"""Resizing and the storage balloon on a real btrfs, while files are written to it."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
import pytest

from agent.pb import vm_guest_pb2
from tests.namespace.test_maitred_termina import MIB, _in_vm, _loop_device, _start, pytestmark
from tests.namespace.vm_in_namespaces import EMPTY, Vm, in_vm, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pytestmark"]  # without btrfs nothing of this can be tested either

Resize = vm_guest_pb2.ResizeFilesystemResponse


@pytest.fixture
def big_disk(tmp_path: Path) -> Iterator[str]:
    with _loop_device(tmp_path / "big.img", 2048 * MIB) as device:
        yield device


async def _resize(vm: Vm, size: int) -> int:
    request = vm_guest_pb2.ResizeFilesystemRequest(size=size)
    return (await vm.maitred.ResizeFilesystem(request)).status


async def _settled(vm: Vm) -> vm_guest_pb2.GetResizeStatusResponse:
    async with asyncio.timeout(60):
        while True:
            status = await vm.maitred.GetResizeStatus(EMPTY)
            if not status.resize_in_progress:
                return status
            await asyncio.sleep(0.01)


class _Writer:
    """Writes files below a directory until it is stopped, and knows what is in them."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.has_written = threading.Event()
        self.digests: dict[str, str] = {}

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set() and number < 60:
            content = number.to_bytes(4, "little") * (MIB // 4)
            path = f"{self._directory}/file{number}"
            with open(path, "wb") as file:
                file.write(content)
            self.digests[path] = hashlib.blake2b(content).hexdigest()
            number += 1
            if number > 3:
                self.has_written.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_growing_and_shrinking_while_files_are_written_loses_nothing(
    tmp_path: Path, big_disk: str
) -> None:
    async def scenario(vm: Vm) -> None:
        await _start(vm, big_disk)
        # The mount as it is seen from here, in another mount namespace.
        inside = f"/proc/{vm.init_pid}/root{tmp_path}/stateful"
        with _Writer(inside) as writer:
            for size in (1024 * MIB, 1536 * MIB + 5, 700 * MIB, 2048 * MIB):
                assert await _resize(vm, size) == Resize.STARTED
                status = await _settled(vm)
                assert status.current_size == status.target_size == size - size % 4096
            await asyncio.to_thread(writer.has_written.wait, 60)
        assert len(writer.digests) > 3
        for path, digest in writer.digests.items():
            assert hashlib.blake2b(Path(path).read_bytes()).hexdigest() == digest

    _in_vm(tmp_path, scenario)


def test_one_resize_at_a_time_and_bounds_that_hold(tmp_path: Path, big_disk: str) -> None:
    async def scenario(vm: Vm) -> None:
        await _start(vm, big_disk)
        one, other = await asyncio.gather(_resize(vm, 600 * MIB), _resize(vm, 700 * MIB))
        assert sorted([one, other]) == [Resize.ALREADY_IN_PROGRESS, Resize.STARTED]
        before = (await _settled(vm)).current_size
        for bad in (0, 1, 3000 * MIB, (1 << 64) - 1):
            assert await _resize(vm, bad) == Resize.FAILED
        assert (await _settled(vm)).current_size == before
        bounds = await vm.maitred.GetResizeBounds(EMPTY)
        assert 0 < bounds.minimum_size < before
        # Less than can be: as far as it went, and said on the console.
        assert await _resize(vm, 4096 * 10) == Resize.STARTED
        assert (await _settled(vm)).current_size >= 16 * MIB
        assert "cannot resize the stateful disk to 0 MiB" in vm.console.read_text()

    _in_vm(tmp_path, scenario)


def test_the_balloon_leaves_what_the_host_can_back(tmp_path: Path, big_disk: str) -> None:
    async def scenario(vm: Vm) -> None:
        async def update(free: int, state: int = vm_guest_pb2.DISK_LOW) -> int:
            request = vm_guest_pb2.UpdateStorageBalloonRequest(
                state=state,  # type: ignore[arg-type]  # an int is one
                free_space_bytes=free,
            )
            return (await vm.maitred.UpdateStorageBalloon(request)).result

        async def available() -> int:
            return (await vm.maitred.GetAvailableSpace(EMPTY)).available_space

        await _start(vm, big_disk)
        all_of_it = await available()
        for free in (500 * MIB, 300 * MIB, 900 * MIB):
            assert await update(free) == vm_guest_pb2.SUCCESS
            assert abs(await available() - free) < 64 * MIB
        assert await update(0, vm_guest_pb2.DISK_NONE) == vm_guest_pb2.SUCCESS
        assert await available() > 800 * MIB
        assert await update(1 << 50, vm_guest_pb2.DISK_NORMAL) == vm_guest_pb2.SUCCESS
        assert abs(await available() - all_of_it) < 64 * MIB
        image = tmp_path / "big.img"
        assert image.stat().st_blocks * 512 < 300 * MIB, "the balloon costs the host room"

    _in_vm(tmp_path, scenario)


def test_before_a_suspend_everything_is_on_the_disk(tmp_path: Path, big_disk: str) -> None:
    token = os.urandom(64)

    def is_on_the_disk() -> bool:
        with (
            (tmp_path / "big.img").open("rb") as image,
            mmap.mmap(image.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(token) >= 0

    async def scenario(vm: Vm) -> None:
        await _start(vm, big_disk)
        Path(f"/proc/{vm.init_pid}/root{tmp_path}/stateful/file").write_bytes(token)
        assert not is_on_the_disk()  # btrfs waits for up to 30 s
        await vm.maitred.PrepareToSuspend(EMPTY)
        assert is_on_the_disk()

    _in_vm(tmp_path, scenario)


def test_without_the_disk_there_is_nothing_to_resize(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        assert await _resize(vm, 1 << 30) == Resize.FAILED
        balloon = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_LOW)
        for call in (
            vm.maitred.GetResizeStatus(EMPTY),
            vm.maitred.GetResizeBounds(EMPTY),
            vm.maitred.GetAvailableSpace(EMPTY),
            vm.maitred.UpdateStorageBalloon(balloon),
        ):
            code, details = await refusal(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert details == "the stateful disk is not mounted; StartTermina does it"
        negative = vm_guest_pb2.UpdateStorageBalloonRequest(free_space_bytes=-1)
        code, _ = await refusal(vm.maitred.UpdateStorageBalloon(negative))
        assert code is grpc.StatusCode.INVALID_ARGUMENT

    in_vm(tmp_path, scenario)
