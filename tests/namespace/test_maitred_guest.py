"""The calls that change the guest itself: users, timezone, token, name servers, IPv6, clock."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from agent.pb import vm_guest_pb2
from tests.namespace.vm_in_namespaces import EMPTY, PRIVATE_FILES, Vm, in_vm, refusal

if TYPE_CHECKING:
    from pathlib import Path

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_NOW = grpc.StatusCode.FAILED_PRECONDITION


async def _set_up(
    vm: Vm, username: str, uid: int | None = None, *groups: str
) -> vm_guest_pb2.SetUpUserResponse:
    return await vm.maitred.SetUpUser(
        vm_guest_pb2.SetUpUserRequest(username=username, uid=uid, group_names=groups)
    )


def test_users_are_made_with_their_groups_and_kept(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        made = await _set_up(vm, "tux", 1234, "audio", "video")
        assert (made.success, made.failure_reason, made.username) == (True, "", "tux")
        assert vm.inside("id", "-u", "tux").strip() == "1234"
        assert vm.inside("id", "-nG", "tux").split() == ["tux", "audio", "video"]
        assert vm.inside("stat", "-c", "%U", "/home/tux").strip() == "tux"

        again = await _set_up(vm, "tux", 1234, "dialout")
        assert (again.success, again.username) == (True, "tux")
        assert set(vm.inside("id", "-nG", "tux").split()) == {"tux", "audio", "video", "dialout"}

        # Who has the uid keeps the name.
        other = await _set_up(vm, "tuxedo", 1234, "cdrom")
        assert (other.success, other.username) == (True, "tux")
        assert "cdrom" in vm.inside("id", "-nG", "tux").split()

        free = await _set_up(vm, "anybody")
        assert free.success
        assert int(vm.inside("id", "-u", "anybody")) >= 1000

    in_vm(tmp_path, scenario, before=PRIVATE_FILES)


def test_users_that_cannot_be_are_refused_without_their_name(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await _set_up(vm, "tux", 1234)
        before = vm.inside("cat", "/etc/passwd", "/etc/group")
        for username, uid, groups, why in (
            ("", None, (), "that is not a user name"),
            ("Tux; reboot", None, (), "that is not a user name"),
            ("x" * 40, None, (), "that is not a user name"),
            ("root", None, (), "is no user to set up"),
            ("daemon", None, (), "$USERNAME is a user of the system"),
            ("tuxine", 0, (), "uid 0 is not for users"),
            ("tuxine", 65534, (), "uid 65534 is not for users"),
            ("tuxine", None, ("nogrouplikethis",), "there is no group 'nogrouplikethis'"),
            ("tux", 1300, (), "$USERNAME is there with uid 1234, not 1300"),
        ):
            response = await _set_up(vm, username, uid, *groups)
            assert not response.success
            assert why in response.failure_reason
        assert vm.inside("cat", "/etc/passwd", "/etc/group") == before
        assert "tux" not in vm.console.read_text()

    in_vm(tmp_path, scenario, before=PRIVATE_FILES)


def test_the_timezone_is_a_link_or_a_mount(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        def request(name: str, *, use_bind_mount: bool = False) -> vm_guest_pb2.SetTimezoneRequest:
            return vm_guest_pb2.SetTimezoneRequest(
                timezone_name=name, use_bind_mount=use_bind_mount
            )

        await vm.maitred.SetTimezone(request("Asia/Tokyo"))
        assert vm.inside("date", "+%Z").strip() == "JST"
        assert vm.inside("readlink", "/etc/localtime").strip() == "/usr/share/zoneinfo/Asia/Tokyo"
        tokyo = vm.inside("sha256sum", "/usr/share/zoneinfo/Asia/Tokyo")
        for name, expected in (("Europe/Zurich", "CE"), ("America/New_York", "E")):
            await vm.maitred.SetTimezone(request(name, use_bind_mount=True))
            assert vm.inside("date", "+%Z").startswith(expected)
            mounts = vm.inside("cat", "/proc/self/mountinfo").split()
            assert mounts.count("/etc/localtime") == 1
        assert vm.inside("sha256sum", "/usr/share/zoneinfo/Asia/Tokyo") == tokyo
        await vm.maitred.SetTimezone(request(""))
        assert vm.inside("date", "+%Z").strip() == "UTC"
        for bad in (
            "Nowhere",
            "../../../etc/passwd",
            "/etc/passwd",
            "Europe",
            "tzdata.zi",
            "Europe/../../../../etc/shadow",
            "Asia/Tokyo\0",
        ):
            code, details = await refusal(vm.maitred.SetTimezone(request(bad)))
            assert (code, details[:24]) == (INVALID, "cannot set the timezone:")
        assert vm.inside("date", "+%Z").strip() == "UTC"

    in_vm(tmp_path, scenario, before=PRIVATE_FILES)


def test_the_token_is_for_its_user_only(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        def request(token: str, user: str) -> vm_guest_pb2.ConfigureContainerGuestRequest:
            return vm_guest_pb2.ConfigureContainerGuestRequest(
                container_token=token, vm_username=user
            )

        await _set_up(vm, "tux", 1234)
        await vm.maitred.ConfigureContainerGuest(request("secret", "tux"))
        path = "/dev/.container_token"
        assert vm.inside("cat", path) == "secret"
        assert vm.inside("stat", "-c", "%a %u %g", path).split()[:2] == ["400", "1234"]
        await vm.maitred.ConfigureContainerGuest(request("newer", ""))
        assert vm.inside("stat", "-c", "%a %u", path).split() == ["400", "0"]
        for token in ("", "a\nb", "x" * 5000):
            code, _ = await refusal(vm.maitred.ConfigureContainerGuest(request(token, "tux")))
            assert code is INVALID
        code, details = await refusal(
            vm.maitred.ConfigureContainerGuest(request("t", "nobodyhere"))
        )
        assert (code, "nobodyhere" in details) == (NOT_NOW, False)
        assert vm.inside("cat", path) == "newer"
        assert "secret" not in vm.console.read_text()

    in_vm(tmp_path, scenario, before=PRIVATE_FILES)


def test_the_clock_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        before = time.time()
        for seconds, nanos, expected in (
            (0, 0, INVALID),
            (-5, 0, INVALID),
            (86_400, 0, INVALID),
            (1_700_000_000, 2_000_000_000, INVALID),
            (1 << 62, 0, INVALID),
            (1_700_000_000, 0, NOT_NOW),
        ):
            request = vm_guest_pb2.SetTimeRequest(time=Timestamp(seconds=seconds, nanos=nanos))
            code, _ = await refusal(vm.maitred.SetTime(request))
            assert code is expected
        code, _ = await refusal(vm.maitred.SetTime(vm_guest_pb2.SetTimeRequest()))
        assert code is INVALID
        assert 0 <= time.time() - before < 60

    in_vm(tmp_path, scenario)


def test_name_servers_are_replaced(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        def request(*servers: str) -> vm_guest_pb2.SetResolvConfigRequest:
            return vm_guest_pb2.SetResolvConfigRequest(
                resolv_config=vm_guest_pb2.ResolvConfig(nameservers=servers)
            )

        path = tmp_path / "resolv.conf"
        await vm.maitred.SetResolvConfig(request("1.1.1.1", "8.8.8.8"))
        assert path.read_text() == "nameserver 1.1.1.1\nnameserver 8.8.8.8\n"
        code, _ = await refusal(vm.maitred.SetResolvConfig(request("1.1.1.1", "x")))
        assert code is INVALID
        code, _ = await refusal(vm.maitred.SetResolvConfig(vm_guest_pb2.SetResolvConfigRequest()))
        assert code is INVALID
        assert path.read_text() == "nameserver 1.1.1.1\nnameserver 8.8.8.8\n"
        await vm.maitred.SetResolvConfig(request())
        assert path.read_text() == ""

    in_vm(tmp_path, scenario)


def test_the_kernel_tells_its_version(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        answer = await vm.maitred.GetKernelVersion(EMPTY)
        assert (answer.kernel_release, answer.kernel_version) == (
            os.uname().release,
            os.uname().version,
        )

    in_vm(tmp_path, scenario)


VETH = "ip link add eth0 type veth peer name peer0; ip link set peer0 up; ip link set eth0 up"


def test_ipv6_is_learnt_anew(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        vm.inside("ip", "addr", "add", "fd00::9/64", "dev", "eth0")
        vm.inside("ip", "-6", "route", "add", "default", "via", "fd00::1", "dev", "eth0")
        vm.inside("ip", "addr", "add", "10.0.0.1/24", "dev", "eth0")
        await vm.maitred.ResetIPv6(EMPTY)
        (link,) = vm.ip("addr", "show", "dev", "eth0")
        found = [(one["family"], one["scope"]) for one in link["addr_info"]]
        assert ("inet6", "global") not in found
        assert ("inet", "global") in found
        assert "default" not in [route["dst"] for route in vm.ip("-6", "route")]

    in_vm(tmp_path, scenario, before=VETH)


def test_after_a_change_of_network_neighbours_and_leases_are_new(tmp_path: Path) -> None:
    # What counts is the program's name: this stands in for a client that would need a server.
    client = tmp_path / "dhclient"
    client.symlink_to("/bin/sleep")

    async def scenario(vm: Vm) -> None:
        vm.inside("ip", "addr", "add", "10.0.0.1/24", "dev", "eth0")
        neighbour = ("neigh", "add", "10.0.0.7", "lladdr", "02:00:00:00:00:07", "dev", "eth0")
        vm.inside("ip", *neighbour, "nud", "reachable")
        for argv in ([str(client), "1000"], ["sleep", "2000"]):
            await vm.maitred.LaunchProcess(
                vm_guest_pb2.LaunchProcessRequest(argv=argv, respawn=True)
            )
        before, other = vm.pid_of("1000"), vm.pid_of("2000")
        await vm.maitred.OnHostNetworkChanged(EMPTY)
        async with asyncio.timeout(20):
            # Between its end and its next start there is none.
            while [pid for pid, argv in vm.processes().items() if "1000" in argv] in ([], [before]):
                await asyncio.sleep(0.01)
        assert vm.pid_of("2000") == other
        assert vm.ip("neigh", "show", "10.0.0.7") == []

    in_vm(tmp_path, scenario, before=VETH)


def test_without_the_interface_there_is_nothing_to_learn(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        for call in (vm.maitred.ResetIPv6(EMPTY), vm.maitred.OnHostNetworkChanged(EMPTY)):
            code, details = await refusal(call)
            assert code is NOT_NOW
            assert "eth0" in details

    in_vm(tmp_path, scenario)


def test_9p_needs_a_host_to_call(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        for port, expected in ((0, "EINVAL"), (2**32 - 1, "EINVAL"), (5000, "EAFNOSUPPORT")):
            request = vm_guest_pb2.Mount9PRequest(port=port, target=str(tmp_path / "nine"))
            answer = await vm.maitred.Mount9P(request)
            assert errno_name(answer.error) == expected

    in_vm(tmp_path, scenario)


def errno_name(number: int) -> str:
    import errno

    return errno.errorcode[number]
