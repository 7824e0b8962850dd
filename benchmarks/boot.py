"""From exec of /sbin/init to VmReady, beside what `python3 -I` takes in the same guest to import
grpc and make one unary call; and PID 1's memory. Both run code that the emulator has not seen.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from host.build_files import BUILD_DIR, GuestImage
from host.commands import run_in_guest
from host.vm import Vm

ROUNDS = 7

_PEER = """
import grpc
assert "/cold/" in grpc.__file__, grpc.__file__
channel = grpc.insecure_channel("unix:/run/maitred/maitred.sock")
call = channel.unary_unary("/vm_tools.Maitred/GetKernelVersion")
try:
    call(b"", timeout=20)
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error
"""

# A copy of Python and its libraries, because an emulator runs code that it has translated before
# several times faster: maitred is the first in the VM to run grpc, and so is the peer to run its
# copy. Both ends are read in the guest, off the clock that the console's lines show.
_TIMED_PEER = f"""
mkdir -p /tmp/cold/bin /tmp/cold/lib /tmp/cold/local/lib
cp /usr/bin/python3.11 /tmp/cold/bin/
cp -a /usr/lib/python3 /usr/lib/python3.11 /tmp/cold/lib/
cp -a /usr/local/lib/python3.11 /tmp/cold/local/lib/
read -r start _ < /proc/uptime
/tmp/cold/bin/python3.11 -I -c '{_PEER}' || exit 1
read -r end _ < /proc/uptime
echo "peer $start $end"
grep VmRSS: /proc/1/status
"""


def _stamp(text: str, line: str) -> float:
    found = re.search(rf"^\[ *([0-9.]+)\] {line}", text, re.MULTILINE)
    assert found, f"no line {line!r} on the console:\n{text}"
    return float(found[1])


async def _round(image: GuestImage) -> tuple[float, float, int]:
    with tempfile.TemporaryDirectory(prefix="termina-bench-") as directory:
        async with Vm(image, run_dir=Path(directory)) as vm:
            await vm.boot()
            await vm.ready()
            finished = await run_in_guest(vm, ["/bin/sh", "-c", _TIMED_PEER], timeout=300)
            assert finished.code == 0, finished.output
            _, start, end = re.search(r"(peer) (\S+) (\S+)", finished.output).groups()  # type: ignore[union-attr]
            memory = int(re.search(r"VmRSS:\s*(\d+)", finished.output)[1])  # type: ignore[index]
            ours = _stamp(vm.boot_text, "maitred: the host knows") - _stamp(
                vm.boot_text, "initrd: /dev/vda mounted"
            )
            await vm.shut_down()
            return ours, float(end) - float(start), memory


async def _rounds() -> list[tuple[float, float, int]]:
    image = GuestImage.in_directory(BUILD_DIR / "image")
    return [await _round(image) for _ in range(ROUNDS)]


def run() -> Iterator[Figure]:
    """Boots the guest a few times; medians."""
    rounds = asyncio.run(_rounds())
    times = [(ours, peer) for ours, peer, _ in rounds]
    peer_is = "python3 -I, import grpc, one call"
    yield Figure(
        "exec of /sbin/init to VmReady",
        {"ours": statistics.median(ours for ours, _ in times),
         peer_is: statistics.median(peer for _, peer in times)},
        "s",
    )  # fmt: skip
    # A neighbour of this machine slows a boot down, but seldom one half of it.
    ratio = statistics.median(ours / peer for ours, peer in times)
    yield Figure(
        "the same, as a multiple of the peer's in the same boot",
        {"ours": ratio, peer_is: 1},
        "×",
        "≤ 1.5",
        ratio <= 1.5,
    )
    memory = max(each[2] for each in rounds) / 1024
    yield Figure("RSS of PID 1 in the VM", {"ours": memory}, "MiB", "≤ 14", memory <= 14)
