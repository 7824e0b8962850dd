"""Arbitrary well-formed messages to every call, and very many calls at once."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agent.pb import vm_guest_pb2
from tests.namespace.vm_in_namespaces import EMPTY, PRIVATE_FILES, PRIVATE_ROOT, Vm, in_vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

_METHODS = {
    method.name: method
    for method in vm_guest_pb2.DESCRIPTOR.services_by_name["Maitred"].methods
    if method.name != "Shutdown"
}
_EXAMPLES = 25
_FEW = {"StartTermina": 4, "PrepareToSuspend": 2}  # these take their time
_DEADLINE = 20

_WORDS = st.sampled_from(
    [
        *("", "/", ".", "..", "/mnt", "/dev/null", "/no/such/thing", "a/../b", "//", "\0", "\n"),
        *("true", "/bin/false", "tmpfs", "proc", "ext4", "none", "eth0", "1.2.3.4", "fe80::1%x"),
        *(
            "UTC",
            "Europe/Zurich",
            "root",
            "tux",
            "audio",
            "100.115.92.1/24",
            "$(reboot)",
            "x" * 5000,
        ),
    ]
)
_TEXT = _WORDS | st.text(max_size=40)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_GOOD = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,  # with a reason
}


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        assert field.message_type is not None
        return _message(field.message_type)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _TEXT
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-1, 5)
    low, high = _RANGES[field.cpp_type]
    return st.integers(low, high) | st.sampled_from([0, 1, 4096])


def _message(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            fields[field.name] = st.dictionaries(_TEXT, _TEXT, max_size=3)
        elif field.is_repeated:
            fields[field.name] = st.lists(_value(field), max_size=4)
        else:
            fields[field.name] = _value(field)
    return st.fixed_dictionaries({}, optional=fields).map(
        lambda values: GetMessageClass(descriptor)(**values)
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Vm]]:
    """One maitred for all of them: what one call leaves behind, the next one has to live with."""
    before = f"{PRIVATE_ROOT}\nip link add eth0 type veth peer name peer0"
    with asyncio.Runner() as runner:
        vm = Vm(tmp_path_factory.mktemp("vm"), before=before)
        runner.run(vm.__aenter__())
        try:
            yield runner, vm
            console = vm.console.read_text(errors="replace")
            assert "Traceback" not in console
            assert "maitred exited" not in console
        finally:
            runner.run(vm.__aexit__())


def _state(vm: Vm) -> dict[str, str]:
    """What a call that failed must not have changed."""
    init = Path(f"/proc/{vm.init_pid}")
    files = ["mountinfo", "net/fib_trie", "net/route", "net/if_inet6"]
    files += [f"root/etc/{name}" for name in ("passwd", "group", "localtime")]
    state = {name: _text(init / name) for name in files}
    state["resolv.conf"] = _text(vm.directory / "resolv.conf")
    state["/"] = " ".join(sorted(path.name for path in (init / "root").iterdir()))
    state["processes"] = str(sorted(vm.processes()))
    # Reference counts and the order of a hash table are no configuration.
    state["net/route"] = re.sub(r"\t\d+\t\d+\t", "\t", state["net/route"])
    del state["net/if_inet6"]  # the kernel goes on with duplicate address detection by itself
    return state


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return type(error).__name__


async def _call(vm: Vm, method: MethodDescriptor, request: Message) -> bool:
    """Whether the call failed, in whatever way it has for that."""
    try:
        response = await getattr(vm.maitred, method.name)(request, timeout=_DEADLINE)
    except grpc.aio.AioRpcError as error:
        if error.code() not in _GOOD or not error.details():
            raise
        return True
    failed = bool(getattr(response, "error", 0) or getattr(response, "failure_reason", ""))
    await vm.maitred.GetKernelVersion(EMPTY, timeout=_DEADLINE)
    return failed


@pytest.mark.parametrize("name", sorted(_METHODS))
def test_any_message_is_served_or_refused(shared: tuple[asyncio.Runner, Vm], name: str) -> None:
    runner, vm = shared
    method = _METHODS[name]

    @settings(
        max_examples=_FEW.get(name, _EXAMPLES),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_message(method.input_type))
    def scenario(request: Message) -> None:
        before = _state(vm)
        if runner.run(_call(vm, method, request)):
            assert _state(vm) == before

    scenario()


def test_200_calls_at_once(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        launch = vm_guest_pb2.LaunchProcessRequest(argv=["sleep", "0.2"], wait_for_exit=True)
        mount = vm_guest_pb2.MountRequest(source="none", target="/no/such", fstype="tmpfs")
        calls: list[Any] = []
        for _ in range(50):
            calls += [
                vm.maitred.LaunchProcess(launch),
                vm.maitred.Mount(mount),
                vm.maitred.GetKernelVersion(EMPTY),
                vm.maitred.PrepareToSuspend(EMPTY),
            ]
        async with asyncio.timeout(60):
            await asyncio.gather(*calls)

    in_vm(tmp_path, scenario)


def test_hosts_that_hang_up_in_the_middle_leave_no_child(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        async def hang_up(start: Callable[[], Any], *, times: int) -> None:
            calls = [start() for _ in range(times)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

        maitred = vm.pid_of("agent.maitred")
        for argv in (["true"], ["sleep", "0.1"]):
            request = vm_guest_pb2.LaunchProcessRequest(argv=argv, wait_for_exit=True)
            await hang_up(partial(vm.maitred.LaunchProcess, request), times=50)
        mount = vm_guest_pb2.MountRequest(source="none", target="/no/such", fstype="tmpfs")
        await hang_up(partial(vm.maitred.Mount, mount), times=20)
        user = vm_guest_pb2.SetUpUserRequest(username="tux", uid=1234)
        for seconds in (0.01, 0.05, 0.1):  # at different places in the middle of useradd(8)
            call = vm.maitred.SetUpUser(user)
            await asyncio.sleep(seconds)  # how far it came is what is tested
            call.cancel()
        async with asyncio.timeout(30):
            while len(vm.processes()) > 1 or _children(maitred):
                await asyncio.sleep(0.01)
        assert (await vm.maitred.SetUpUser(user)).username == "tux"
        assert vm.inside("id", "-u", "tux").strip() == "1234"
        assert vm.pid_of("agent.maitred") == maitred

    in_vm(tmp_path, scenario, before=PRIVATE_FILES)


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in _text(task).split()]
