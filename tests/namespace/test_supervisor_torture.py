"""PID 1 under what nobody should do to it: its children killed all the time, and its control socket
fed with anything. TERMINA_LONG=1 makes it 100 kills and 100,000 inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.lean_stdlib import dumps, loads
from agent.pb.vm_guest_pb2 import LaunchProcessRequest
from agent.process_supervisor.client import Client
from agent.process_supervisor.protocol import SIGNALS, STOP_STAGES, ProcessSpec
from tests.namespace.pid_one import PidOne
from tests.namespace.vm_in_namespaces import Vm, in_vm

LONG = os.environ.get("TERMINA_LONG") == "1"
KILLS = 100 if LONG else 6
INPUTS = 100_000 if LONG else 600


@contextlib.contextmanager
def only_unavailable() -> Iterator[None]:
    """A call that maitred was killed under ends so, and in no other way."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise


def test_maitred_is_killed_again_and_again_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    launched: list[str] = []
    unavailable = 0

    async def launch_without_end(vm: Vm, worker: int) -> None:
        """A host that launches processes and does it again when maitred was away."""
        number = 0
        while True:
            name = f"{tmp_path}/launched.{worker}.{number}"
            request = LaunchProcessRequest(
                argv=["sh", "-c", f"echo >>{name}; exit 7"], wait_for_exit=True
            )
            with only_unavailable():
                answer = await vm.maitred.LaunchProcess(request, wait_for_ready=True)
                assert answer.code == 7
                launched.append(name)
            number += 1

    async def wait_without_end(vm: Vm) -> None:
        nonlocal unavailable
        request = LaunchProcessRequest(argv=["sleep", "3000"], wait_for_exit=True)
        with only_unavailable():
            await vm.maitred.LaunchProcess(request)
            return
        unavailable += 1

    async def scenario(vm: Vm) -> None:
        for number in range(20):
            request = LaunchProcessRequest(argv=["sleep", f"{1000 + number}"], respawn=True)
            await vm.maitred.LaunchProcess(request)
        pids = {number: vm.pid_of(f"{1000 + number}") for number in range(20)}
        workers = [asyncio.create_task(launch_without_end(vm, n)) for n in range(4)]
        for _ in range(KILLS):
            waiter = asyncio.create_task(wait_without_end(vm))
            async with asyncio.timeout(20):
                while not any("3000" in argv for argv in vm.processes().values()):
                    await asyncio.sleep(0.01)
            await vm.restart_maitred()
            await waiter
            with Client.connect(str(vm.run_dir), timeout=20) as client:
                for row in client.list():
                    if "3000" in row["argv"] and row["pid"]:
                        client.stop(row["key"])
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        assert {number: vm.pid_of(f"{1000 + number}") for number in range(20)} == pids
        assert unavailable == KILLS
        assert launched
        # Each was run once, whether or not its answer got through.
        for path in tmp_path.glob("launched.*"):
            assert path.read_text() == "\n", path
        children = Path(f"/proc/{vm.init_pid}/task/{vm.init_pid}/children").read_text().split()
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] for pid in children]
        assert "Z" not in states

    in_vm(tmp_path, scenario)


@pytest.fixture(scope="module")
def pid_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PidOne]:
    with PidOne(tmp_path_factory.mktemp("fuzz")) as running:
        yield running


KEYS = st.sampled_from(["a", "b", "maitred", "true#1", ""]) | st.text(max_size=5)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)  # fmt: skip
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "argv": st.sampled_from([["true"], ["false"], ["sleep", "0.01"], ["/nothing"], [], [""]]),
    "env": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    "stop_signal": st.sampled_from(sorted(SIGNALS)),
    "stop_stage": st.sampled_from(STOP_STAGES),
    "user": st.sampled_from(["nobody", "root", "not there"]),
    "rlimits": st.just({"nofile": [64, 64]}),
    "listen": st.lists(st.sampled_from(["unix:/no/dir", "vsock:9", "tcp:1", "unix:/proc/x"])),
    "capabilities": st.lists(st.sampled_from(["chown", "fly"])),
}
LAUNCHES = st.fixed_dictionaries(
    {"op": st.just("launch"), "argv": FIELDS["argv"]},
    optional={
        **{field: FIELDS.get(field, st.booleans()) | ANY for field in ProcessSpec.__slots__[1:]},
        "name": KEYS,
        "wait": st.booleans(),
    },
)
OTHERS = st.fixed_dictionaries(
    {"op": st.sampled_from("wait stop start signal list output events cancel".split()) | ANY},  # noqa: SIM905
    optional={
        "key": KEYS | ANY,
        "signal": st.sampled_from(["SIGHUP", "SIGTERM", "SIGKILL"]) | ANY,
        "after": st.integers() | ANY,
        "offset": st.integers() | ANY,
        "request": st.integers(0, 5) | ANY,
        "output": st.booleans(),
    },
)
REQUESTS = st.tuples(
    st.one_of(LAUNCHES, OTHERS, st.dictionaries(st.text(max_size=5), ANY)),
    st.integers(0, 5) | ANY,
    st.sampled_from([1, 1, 1, 1, 2]) | ANY,
).map(lambda parts: {**parts[0], "id": parts[1], "v": parts[2]})
LINES = REQUESTS.map(lambda request: dumps(request).encode()) | st.binary(max_size=200)


def talk(pid_one: PidOne, lines: list[bytes]) -> None:
    """Says the lines, then one that must be answered, and goes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(pid_one.run_dir / "supervisor.sock"))
        connection.sendall(b"\n".join(lines) + b'\n{"v":1,"id":-77,"op":"list","key":"anchor"}\n')
        with connection.makefile("rb") as reader:
            for line in reader:
                answer = loads(line.decode())
                assert isinstance(answer, dict)
                if answer["id"] == -77 and "event" not in answer:
                    assert answer["processes"][0]["state"] == "running"
                    return
    raise AssertionError("PID 1 hung up")


@pytest.mark.timeout(3600 if LONG else 120)
def test_anything_on_the_control_socket_harms_nobody(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        anchor = client.launch(["sleep", "10000"], name="anchor")

    @settings(
        max_examples=INPUTS // 5,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(LINES, min_size=3, max_size=7))
    def feed(lines: list[bytes]) -> None:
        talk(pid_one, lines)

    feed()
    with pid_one.client() as client:
        assert client.info("anchor")["pid"] == anchor.pid
        assert len(client.list()) < 600
    assert "Error" not in pid_one.console(), pid_one.console()
    os.kill(pid_one.pid, signal.SIGTERM)
    assert pid_one.wait() == 0
