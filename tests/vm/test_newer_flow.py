"""The newer host's flow on the small image, and what a VM in that state must be like. One VM for
all of it, in the order of the file; the last test powers it off and boots it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest

from agent.pb import tremplin_pb2, vm_guest_pb2
from host.build_files import GuestImage
from host.commands import run_in_container, run_in_guest
from host.flows import Reached, network_order
from host.image_server import ImageServer
from host.status import ContainerStatus
from tests.vm.vms import BUSYBOX, TestVm, new_vm

pytestmark = pytest.mark.timeout(500)

_DOWNLOAD_RATE = 700_000  # bytes per second; the small image takes more than a second


@pytest.fixture(scope="module")
def up(
    runner: asyncio.Runner,
    image: GuestImage,
    image_server: ImageServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[TestVm, Reached]]:
    """A VM with a running busybox container."""
    directory = tmp_path_factory.mktemp("newer")
    stack = contextlib.AsyncExitStack()

    async def start() -> tuple[TestVm, Reached]:
        test_vm = await stack.enter_async_context(new_vm(image, directory, image_server))
        image_server.set_rate(_DOWNLOAD_RATE)
        try:
            return test_vm, await test_vm.bring_up()
        finally:
            image_server.set_rate(None)

    try:
        yield runner.run(start())
    finally:
        runner.run(stack.aclose())


def test_container_is_ready(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """User, address and home are told, and the user is who runs commands."""
    test_vm, reached = up
    assert (reached.user, reached.existed) == ("tux", False)
    assert reached.home == "/home/tux"
    assert re.fullmatch(r"100\.115\.92\.\d+", reached.ipv4)
    done = runner.run(run_in_container(test_vm.vm, "penguin", ["id"], user="tux"))
    assert done.output.startswith("uid=1000(tux)"), done
    token = runner.run(run_in_container(test_vm.vm, "penguin", ["cat", "/dev/.container_token"]))
    assert re.fullmatch(r"[0-9a-f]{32}\n?", token.output), token


def test_states_come_in_order_and_percentages_rise(up: tuple[TestVm, Reached]) -> None:
    """LAUNCHING_GUEST to READY without a step back, the download from 0 to 100."""
    test_vm, _ = up
    states = [info.container_status for info in test_vm.history]
    assert states == sorted(states)
    assert list(dict.fromkeys(states)) == [
        ContainerStatus.LAUNCHING_GUEST,
        ContainerStatus.STARTING_VM,
        ContainerStatus.DOWNLOADING,
        ContainerStatus.EXTRACTING,
        ContainerStatus.STARTING,
        ContainerStatus.READY,
    ]
    progress = tremplin_pb2.ContainerCreationProgress
    sent = test_vm.vm.recorder.of("UpdateCreateStatus")
    percents = [each.download_progress for each in sent if each.status == progress.DOWNLOADING]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 3
    assert [each.status for each in sent].count(progress.CREATED) == 1
    assert sent[-1].status == progress.CREATED


def test_disks_of_the_host_are_mounted(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """The tools image and the shared one can be read, the latter in the container too."""
    vm = up[0].vm
    done = runner.run(run_in_guest(vm, ["cat", "/opt/google/cros-containers/README"]))
    assert done.output == "The host's programs for containers go here.\n"
    shared = runner.run(run_in_container(vm, "penguin", ["cat", "/mnt/chromeos/README"]))
    assert shared.output == "Files that the host shares with every container of this VM.\n"


def test_console_has_stage_lines_and_no_traceback(up: tuple[TestVm, Reached]) -> None:
    """Every program of ours says what it does, with the time since the kernel started."""
    text = up[0].vm.boot_text
    assert "Traceback" not in text
    for program in ("init", "maitred", "tremplin"):
        assert re.search(rf"^\[ *\d+\.\d{{3}}\] {program}: ", text, re.MULTILINE), program


def test_pid_1_is_small(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """At most 14 MB resident."""
    done = runner.run(run_in_guest(up[0].vm, ["grep", "VmRSS", "/proc/1/status"]))
    assert int(done.output.split()[1]) <= 14 * 1024


def test_no_zombies_and_no_failed_process(
    up: tuple[TestVm, Reached], runner: asyncio.Runner
) -> None:
    """PID 1 reaps everything."""
    done = runner.run(run_in_guest(up[0].vm, ["ps", "-eo", "stat=,comm="]))
    assert done.code == 0
    assert not [line for line in done.output.splitlines() if line.startswith("Z")]


def test_listening_ports_are_told(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """The guest's kernel says over netlink what listens in a container."""
    vm = up[0].vm
    listen = "nc -l -p 8125 </dev/null >/dev/null 2>&1 &"
    runner.run(run_in_container(vm, "penguin", ["sh", "-c", listen]))

    def told(message: Any) -> bool:
        return 8125 in message.container_ports["penguin"].listening_tcp4_ports

    telling = vm.recorder.wait_for("UpdateListeningPorts", told, since=vm.boot_events)
    runner.run(asyncio.wait_for(telling, 60))


_STRANGER = """
import fcntl, socket, struct
with open("/dev/vsock", "rb") as device:
    own = struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))[0]
for cid in (1, own):
    for port in (8888, 8890):
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            try:
                sock.connect((cid, port))
                sock.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(9))
                print("answered" if sock.recv(1) else "refused")
            except ConnectionError:
                print("refused")
"""


def test_strangers_on_vsock_are_refused(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """Nobody but the host gets an answer, neither on loopback nor through the VM's own CID."""
    vm = up[0].vm
    # Not loaded by itself; without it nobody in the VM could even connect.
    assert runner.run(run_in_guest(vm, ["modprobe", "vsock_loopback"])).code == 0
    done = runner.run(run_in_guest(vm, ["python3", "-I", "-c", _STRANGER]))
    assert done.output.split() == ["refused"] * 4, done


def test_bad_calls_get_clear_errors(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """Over the real wire: what is wrong is told where the contract says, and changes nothing."""
    vm = up[0].vm
    launch, mount = vm_guest_pb2.LaunchProcessRequest, vm_guest_pb2.MountRequest

    async def code_of(call: grpc.aio.UnaryUnaryCall[Any, Any]) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code().name, caught.value.details() or ""

    async def scene() -> None:
        for request in (
            launch(),
            launch(argv=["/bin/true"], respawn=True, wait_for_exit=True),
        ):
            code, details = await code_of(vm.maitred.LaunchProcess(request, timeout=20))
            assert code == "INVALID_ARGUMENT"
            assert details.startswith("cannot ")
        failed = await vm.maitred.LaunchProcess(launch(argv=["/no/such"]), timeout=20)
        assert failed.status == vm_guest_pb2.FAILED
        for numbers in (("0.0.0.0", "255.255.255.0", "10.0.2.2"),
                        ("10.0.2.15", "0.0.0.0", "10.0.2.2"),
                        ("10.0.2.15", "255.255.255.0", "0.0.0.0")):  # fmt: skip
            address, netmask, gateway = map(network_order, numbers)
            config = vm_guest_pb2.IPv4Config(address=address, netmask=netmask, gateway=gateway)
            code, details = await code_of(
                vm.maitred.ConfigureNetwork(
                    vm_guest_pb2.NetworkConfigRequest(ipv4_config=config), timeout=20
                )
            )
            assert code == "INVALID_ARGUMENT"
            assert details.startswith("cannot ")
        answer = await vm.maitred.Mount(
            mount(source="/dev/vdz", target="/mnt/none", fstype="ext4", create_target=True),
            timeout=20,
        )
        assert answer.error == 2  # ENOENT

    runner.run(scene())


@pytest.mark.parametrize(
    ("request_fields", "reason"),
    [
        ({"image_alias": "no/such"}, "be found"),
        ({"image_server": "http://10.0.2.2:1"}, "refused"),
        ({"container_name": "no_such_name!"}, "name"),
    ],
)
def test_bad_containers_fail_with_a_reason(
    up: tuple[TestVm, Reached],
    runner: asyncio.Runner,
    request_fields: dict[str, str],
    reason: str,
) -> None:
    """Either the answer or exactly one report is FAILED and says why; nothing is left."""
    test_vm, _ = up
    fields = {
        "container_name": "other",
        "image_server": test_vm.image_server.guest_url,
        "image_alias": BUSYBOX,
    } | request_fields
    create = tremplin_pb2.CreateContainerResponse
    progress = tremplin_pb2.ContainerCreationProgress

    async def scene() -> str:
        since = len(test_vm.vm.recorder.events)
        request = tremplin_pb2.CreateContainerRequest(**fields)
        answer = await test_vm.vm.tremplin.CreateContainer(request, timeout=60)
        if answer.status == create.FAILED:
            return answer.failure_reason
        assert answer.status == create.CREATING
        told = await test_vm.vm.alive(
            test_vm.vm.recorder.wait_for(
                "UpdateCreateStatus",
                lambda message: message.status != progress.DOWNLOADING,
                since=since,
            ),
            timeout=90,
            what="fail",
        )
        assert told.status == progress.FAILED
        return str(told.failure_reason)

    assert reason in runner.run(scene())
    answer = runner.run(_info(test_vm, fields["container_name"]))
    assert answer.status != tremplin_pb2.GetContainerInfoResponse.RUNNING
    done = runner.run(
        run_in_guest(
            test_vm.vm,
            ["lxc", "list", "--format=csv", "--columns=n"],
            env={"LXD_DIR": "/mnt/stateful/lxd", "LXD_CONF": "/mnt/stateful/lxd_conf"},
        )
    )
    assert done.output.split() == ["penguin"]


async def _info(test_vm: TestVm, name: str) -> tremplin_pb2.GetContainerInfoResponse:
    return await test_vm.vm.tremplin.GetContainerInfo(
        tremplin_pb2.GetContainerInfoRequest(container_name=name), timeout=20
    )


@pytest.mark.parametrize("name", ["", "no name", "../x", "-x"])
def test_bad_user_names_are_refused(
    up: tuple[TestVm, Reached], runner: asyncio.Runner, name: str
) -> None:
    """The reason does not repeat the name, as people's names reach no log."""

    async def scene() -> tremplin_pb2.SetUpUserResponse:
        return await up[0].vm.tremplin.SetUpUser(
            tremplin_pb2.SetUpUserRequest(container_name="penguin", container_username=name),
            timeout=60,
        )

    answer = runner.run(scene())
    assert answer.status == tremplin_pb2.SetUpUserResponse.FAILED
    assert answer.failure_reason


def test_login_appears_on_the_console(up: tuple[TestVm, Reached], runner: asyncio.Runner) -> None:
    """Step 10 of the contract: a login of the user, typed at from the host."""
    test_vm, _ = up
    vm = test_vm.vm

    async def scene() -> None:
        start = vm.console.position
        await test_vm.host().log_in()
        await vm.alive(
            vm.console.wait_for(r"[$#] ?\Z", start=start), timeout=30, what="see a prompt"
        )
        vm.console.write(b"echo I am $(id -un)\n")
        await vm.alive(
            vm.console.wait_for(r"^I am tux", start=start), timeout=30, what="see an answer"
        )

    runner.run(scene())


def test_clean_power_off_and_second_boot(
    up: tuple[TestVm, Reached], runner: asyncio.Runner
) -> None:
    """The VM goes down by itself to the last line; booted again, the container is found."""
    test_vm, first = up

    async def scene() -> Reached:
        assert await test_vm.vm.shut_down(), test_vm.vm.console.last_lines(20)
        test_vm.history.clear()
        second = await test_vm.bring_up()
        assert await test_vm.vm.shut_down(), test_vm.vm.console.last_lines(20)
        return second

    second = runner.run(scene())
    assert (second.existed, second.user) == (True, first.user)
    assert ContainerStatus.DOWNLOADING not in {each.container_status for each in test_vm.history}
    assert "Traceback" not in test_vm.vm.console.text
