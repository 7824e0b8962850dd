"""SetUpUser in the trees of three kinds of distributions, and killed in the middle."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from agent.pb import tremplin_pb2 as pb

if TYPE_CHECKING:
    from tests.lxd.host import Tremplin

_STATUS = pb.SetUpUserResponse


class Tree(NamedTuple):
    """The files of a container that accounts are made of, and who is then the primary user."""

    files: dict[str, str]
    user: str
    status: _STATUS.Status.ValueType
    shell: str
    groups: set[str]


_SHELL = '#!/bin/sh\nexec /bin/sh "$@"\n'
_TREES = {
    "debian": Tree(
        {
            "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
            "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
            "_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\n",
            "etc/shadow": "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
            "etc/group": "root:x:0:\ndaemon:x:1:\naudio:x:29:\nsudo:x:27:\nusers:x:100:\n",
            "etc/gshadow": "root:*::\ndaemon:*::\naudio:*::\nsudo:*::\nusers:*::\n",
            "etc/skel/.bashrc": "# of the skeleton\n",
            "bin/bash": _SHELL,
        },
        "emma",
        _STATUS.SUCCESS,
        "/bin/bash",
        {"emma", "audio", "sudo", "users"},
    ),
    "ubuntu": Tree(
        {
            "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
            "ubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/bin/bash\n# a remark of somebody\n",
            "etc/shadow": "root:*:19000:0:99999:7:::\nubuntu:!:19000:0:99999:7:::\n",
            "etc/group": "root:x:0:\nadm:x:4:syslog,ubuntu\nsudo:x:27:ubuntu\nplugdev:x:46:\n"
            "ubuntu:x:1000:\n",
            "etc/gshadow": "root:*::\nadm:*::syslog,ubuntu\nsudo:*::ubuntu\nubuntu:!::\n",
            "home/ubuntu/.profile": "# his own\n",
            "bin/bash": _SHELL,
        },
        "ubuntu",
        _STATUS.EXISTS,
        "/bin/bash",
        {"ubuntu", "adm", "sudo", "plugdev"},
    ),
    "alpine": Tree(
        {
            "etc/passwd": "root:x:0:0:root:/root:/bin/ash\n"
            "nobody:x:65534:65534:nobody:/:/sbin/nologin",
            "etc/shadow": "root:*::0:::::\nnobody:!::0:::::",
            "etc/group": "root:x:0:root\naudio:x:18:\nvideo:x:27:root\nusers:x:100:games",
        },
        "emma",
        _STATUS.SUCCESS,
        "/bin/sh",
        {"emma", "audio", "video", "users"},
    ),
}


def _create(tremplin: Tremplin, tree: Tree) -> None:
    tremplin.create("users")
    rootfs = tremplin.machine.lxd_dir / "storage-pools/default/containers/users/rootfs"
    accounts = " ".join(f"etc/{name}" for name in ("passwd", "shadow", "group", "gshadow"))
    lines = [f"cd {rootfs}", f"rm -rf {accounts} home bin/bash", "mkdir -p etc/skel home"]
    for path, text in tree.files.items():
        lines += [f"mkdir -p $(dirname {path})", f"printf %s '{text}' >{path}"]
    lines += ["chmod 640 etc/shadow", "[ ! -e bin/bash ] || chmod 755 bin/bash"]
    lines.append(f"[ ! -e home/{tree.user} ] || chown -R 1000:1000 home/{tree.user}")
    tremplin.machine.run("sh", "-e", "-c", "\n".join(lines))


def _set_up(tremplin: Tremplin) -> pb.SetUpUserResponse:
    answer = tremplin.call("SetUpUser", container_name="users", container_username="emma")
    assert isinstance(answer, pb.SetUpUserResponse)
    return answer


def _read(tremplin: Tremplin, path: str) -> str:
    return tremplin.machine.run("lxc", "file", "pull", f"users/{path}", "-")


@pytest.mark.parametrize("kind", _TREES)
def test_trees(tremplin: Tremplin, kind: str) -> None:
    """The user logs in, in the right groups; what was there stays; once more changes nothing."""
    tree = _TREES[kind]
    _create(tremplin, tree)
    answer = _set_up(tremplin)
    assert (answer.status, answer.username) == (tree.status, tree.user), answer
    passwd = _read(tremplin, "etc/passwd")
    assert set(tree.files["etc/passwd"].splitlines()) <= set(passwd.splitlines())
    assert f":/home/{tree.user}:{tree.shell}\n" in passwd
    assert ("etc/gshadow" in tree.files) == (
        "gshadow" in tremplin.machine.run(
            "ls", tremplin.machine.lxd_dir / "storage-pools/default/containers/users/rootfs/etc"
        )
    )  # fmt: skip
    again = _set_up(tremplin)
    assert (again.status, again.username) == (_STATUS.EXISTS, tree.user)
    assert _read(tremplin, "etc/passwd") == passwd

    tremplin.start_container("users")
    groups = set(tremplin.run_in("users", "id", "-nG", tree.user).split())
    assert groups >= tree.groups | {"chronos-access", "android-everybody"}
    login = tremplin.run_in("users", "su", "-", tree.user, "-c", "id -u; pwd; touch mine")
    assert login == f"1000\n/home/{tree.user}\n"
    for path, text in tree.files.items():
        if path == "etc/skel/.bashrc":
            assert tremplin.run_in("users", "cat", f"/home/{tree.user}/.bashrc") == text
        if path.startswith("home/"):
            assert tremplin.run_in("users", "cat", f"/{path}") == text
    assert tremplin.run_in("users", "ls", "/var/lib/systemd/linger").strip() == tree.user
    mode = tremplin.run_in("users", "stat", "-c", "%a", "/etc/shadow").strip()
    assert mode == "640"


def test_nobody_is_named(tremplin: Tremplin) -> None:
    """Neither who was asked for nor who was there already, whose home cannot be made."""
    _create(tremplin, _TREES["ubuntu"])
    rootfs = tremplin.machine.lxd_dir / "storage-pools/default/containers/users/rootfs"
    tremplin.machine.run("sh", "-c", f"cd {rootfs}; rm -r home; echo no directory >home")
    answer = _set_up(tremplin)
    assert answer.status == _STATUS.FAILED
    assert answer.failure_reason.startswith("cannot set up the user of container users: ")
    log = tremplin.log.read_text().rpartition("cannot set up")[2]
    for text in (answer.failure_reason, log):
        assert "ubuntu" not in text
        assert "emma" not in text


def test_tremplin_killed_in_the_middle(tremplin: Tremplin) -> None:
    """Whatever was written, the files are old or new, and a second time completes them."""
    tree = _TREES["debian"]
    for milliseconds in (5, 15, 30, 50, 80):
        _create(tremplin, tree)
        call = tremplin.stub.SetUpUser.future(
            pb.SetUpUserRequest(container_name="users", container_username="emma"), timeout=60
        )
        time.sleep(milliseconds / 1000)  # the moment of the kill is what is varied
        tremplin.kill()
        call.exception()
        for name in ("passwd", "shadow", "group", "gshadow"):
            text = _read(tremplin, f"etc/{name}")
            assert text.endswith("\n")
            assert text.startswith("root:")
            assert len(text) >= len(tree.files[f"etc/{name}"])
        tremplin.start()
        answer = _set_up(tremplin)
        assert answer.username == "emma", answer
        tremplin.start_container("users")
        assert tremplin.run_in("users", "su", "-", "emma", "-c", "id -u").strip() == "1000"
        tremplin.machine.run("lxc", "delete", "--force", "users")
