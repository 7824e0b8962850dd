"""Processes with less than full root, as an option of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.process_supervisor.client import Client, SupervisorError
from tests.namespace.pid_one import PidOne


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    directory: Path = tmp_path_factory.mktemp("confine")
    with PidOne(directory) as running, running.client() as client:
        yield client


def output_of(client: Client, script: str, **options: Any) -> str:
    launched = client.launch(["sh", "-c", script], wait=True, **options)
    return client.output(launched.key)[1].decode().strip()


def status(client: Client, field: str, **options: Any) -> str:
    return output_of(client, f"sed -n 's/^{field}:[[:space:]]*//p' /proc/self/status", **options)


def test_without_options_it_is_full_root(client: Client) -> None:
    assert output_of(client, "id -u; id -g") == "0\n0"
    assert status(client, "NoNewPrivs") == "0"
    assert status(client, "CapBnd") == status(client, "CapEff")


def test_user_and_groups(client: Client) -> None:
    assert output_of(client, "id -un; id -gn; echo $HOME", user="nobody") == (
        "nobody\nnogroup\n/nonexistent"
    )
    assert output_of(client, "id -un; id -gn; id -G", group="daemon") == "root\ndaemon\n1"
    assert output_of(client, "id -un; id -gn", user="nobody", group="daemon") == "nobody\ndaemon"
    assert int(status(client, "CapEff", user="nobody"), 16) == 0


def test_no_new_privs_and_capabilities(client: Client) -> None:
    assert status(client, "NoNewPrivs", no_new_privs=True) == "1"
    kept = ["net_admin", "CAP_SYS_TIME", "cap_chown"]
    mask = 1 << 12 | 1 << 25 | 1 << 0
    assert int(status(client, "CapBnd", capabilities=kept), 16) == mask
    assert int(status(client, "CapEff", capabilities=kept), 16) == mask
    assert int(status(client, "CapEff", capabilities=[]), 16) == 0


def test_limits(client: Client) -> None:
    assert output_of(client, "ulimit -Sn; ulimit -Hn", rlimits={"nofile": [77, 88]}) == "77\n88"


def test_a_confined_process_has_a_clean_start_too(client: Client) -> None:
    assert output_of(client, "echo $PATH; readlink /proc/self/fd/0", no_new_privs=True) == (
        "/usr/bin:/usr/sbin:/bin:/sbin\n/dev/null"
    )
    script = "ls /proc/self/fd | wc -w; exec grep -E '^Sig(Blk|Ign)' /proc/self/status"
    lines = output_of(client, script, no_new_privs=True).splitlines()
    assert lines[0] == "4"
    assert lines[1].split()[1] == "0" * 16
    assert int(lines[2].split()[1], 16) & ~(3 << 31) == 0


def test_it_respawns_confined(client: Client) -> None:
    client.launch(["sh", "-c", "id -un"], name="who", respawn=True, user="nobody")
    client.wait("who")
    assert client.output("who")[1].splitlines()[0] == b"nobody"
    client.stop("who")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"user": "no-such-user"}, "cannot launch true: .*no-such-user"),
        ({"group": "no-such-group"}, "cannot launch true: .*no-such-group"),
        ({"capabilities": ["fly"]}, "cannot launch true: there is no capability fly"),
        ({"memory_max": 1 << 20}, "cannot launch true: Operation not supported"),
        ({"rlimits": {"nofile": [9, 8]}}, "cannot launch true: "),
        ({"rlimits": {"hands": [9, 9]}}, "cannot launch: rlimits is not valid"),
        ({"user": "nobody", "no_new_privs": "yes"}, "no_new_privs is not valid: 'yes'"),
    ],
)
def test_what_cannot_be_had_starts_nothing(
    client: Client, options: dict[str, Any], reason: str
) -> None:
    before = client.list()
    with pytest.raises(SupervisorError, match=reason):
        client.launch(["true"], **options)
    assert len(client.list()) == len(before)
    with pytest.raises(SupervisorError, match="No such file"):
        client.launch(["/nothing"], user="nobody")
