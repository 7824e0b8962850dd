"""The account files as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tremplin.accounts import (
    AccountError,
    AccountFiles,
    Plan,
    User,
    find_user,
    is_username,
    plan,
    without_name,
)

DEBIAN = AccountFiles(
    passwd="root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n",
    group="root:x:0:\naudio:x:29:pulse\nsudo:x:27:\nvideo:x:44:\n",
    shadow="root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
    gshadow="root:*::\naudio:*::pulse\nsudo:*::\nvideo:*::\n",
)
ALPINE = AccountFiles(
    passwd="root:x:0:0:root:/root:/bin/ash\nnobody:x:65534:65534:nobody:/:/sbin/nologin",
    group="root:x:0:root\naudio:x:18:\nusers:x:100:games\n",
    shadow=None,
    gshadow=None,
)


def _plan(files: AccountFiles, username: str = "emma") -> Plan:
    return plan(files, username, shell="/bin/bash", no_shell="/usr/sbin/nologin")


def test_debian() -> None:
    """Everything that the contract names is there, and nothing else has changed."""
    made = _plan(DEBIAN)
    assert made.user == User("emma", 1000, 1000, "/home/emma")
    assert not made.existed
    assert made.files.passwd == DEBIAN.passwd + (
        "emma:x:1000:1000::/home/emma:/bin/bash\n"
        "chronos-access:x:1001:1001::/nonexistent:/usr/sbin/nologin\n"
        "android-everybody:x:665357:665357::/nonexistent:/usr/sbin/nologin\n"
        "android-root:x:655360:655360::/nonexistent:/usr/sbin/nologin\n"
    )
    assert made.files.group == (
        "root:x:0:\naudio:x:29:pulse,emma\nsudo:x:27:emma\nvideo:x:44:emma\nemma:x:1000:\n"
        "chronos-access:x:1001:emma\nandroid-everybody:x:665357:emma\nandroid-root:x:655360:emma\n"
    )
    assert made.files.gshadow is not None
    assert "audio:*::pulse,emma\n" in made.files.gshadow
    assert "android-root:!::emma\n" in made.files.gshadow
    assert made.files.shadow is not None
    assert "emma:*::0:99999:7:::\n" in made.files.shadow


def test_without_shadow_files() -> None:
    """They are not invented, and the password field does not refer to them."""
    made = _plan(ALPINE)
    assert (made.files.shadow, made.files.gshadow) == (None, None)
    assert "\nemma:*:1000:1000::/home/emma:/bin/bash\n" in made.files.passwd
    assert "users:x:100:games,emma\n" in made.files.group


@pytest.mark.parametrize("files", [DEBIAN, ALPINE])
def test_second_time(files: AccountFiles) -> None:
    """Nothing changes, and the user is said to have been there."""
    once = _plan(files)
    twice = _plan(once.files)
    assert twice.existed
    assert twice.files == once.files


@pytest.mark.parametrize("written", range(1, 4))
def test_killed_in_the_middle(written: int) -> None:
    """With only the first files written, a second time completes them."""
    whole = _plan(DEBIAN)
    order = ("group", "gshadow", "shadow", "passwd")[:written]
    partly = DEBIAN._replace(**{name: getattr(whole.files, name) for name in order})
    again = _plan(partly)
    assert again.files == whole.files
    assert again.user == whole.user


def test_somebody_is_there() -> None:
    """Who has uid 1000 keeps the name and joins the groups."""
    files = DEBIAN._replace(
        passwd=DEBIAN.passwd + "lee:x:1000:100:Lee,,,:/srv/lee:/bin/zsh\n",
        group=DEBIAN.group + "users:x:100:\n",
    )
    made = _plan(files)
    assert made.existed
    assert made.user == User("lee", 1000, 100, "/srv/lee")
    assert "emma" not in made.files.passwd + made.files.group
    assert "sudo:x:27:lee\n" in made.files.group
    assert "chronos-access:x:1001:lee\n" in made.files.group


def test_ids_of_others_are_left_alone() -> None:
    """A second user with uid 1001 is no reason to refuse."""
    files = DEBIAN._replace(
        passwd=DEBIAN.passwd + "kim:x:1001:1001::/home/kim:/bin/sh\n",
        group=DEBIAN.group + "kim:x:1001:\nstaff:x:1000:\n",
    )
    made = _plan(files)
    assert "chronos-access" not in made.files.passwd
    assert made.user.gid == 1000
    assert made.files.group.count(":1000:") == 1


def test_lines_that_mean_nothing_stay() -> None:
    """Comments, NIS entries at the end, odd fields and bytes that are not UTF-8."""
    files = DEBIAN._replace(passwd="# a comment\n" + DEBIAN.passwd + "odd:line\n\udcff\n+::::::\n")
    made = _plan(files)
    lines = made.files.passwd.split("\n")
    assert lines[0] == "# a comment"
    assert lines[-2] == "+::::::"
    for line in files.passwd.split("\n"):
        assert line in lines


@pytest.mark.parametrize(
    ("username", "files", "reason"),
    [
        ("daemon", DEBIAN, r"\$USERNAME is the name of a system user"),
        ("audio", DEBIAN, r"\$USERNAME is the name of a system group"),
        ("android-root", DEBIAN, r"\$USERNAME is the name of a system user"),
        ("no such name", DEBIAN, r"\$USERNAME is not a user name"),
        ("emma", DEBIAN._replace(passwd="daemon:x:1:1::/:/bin/sh\n"), "no root user"),
        ("emma", DEBIAN._replace(passwd=""), "no root user"),
    ],
)
def test_refused(username: str, files: AccountFiles, reason: str) -> None:
    """With a reason that does not hold the name."""
    with pytest.raises(AccountError, match=reason) as caught:
        _plan(files, username)
    assert username not in str(caught.value)


@pytest.mark.parametrize("name", ["emma", "e", "john.doe", "Emma_2", "_x", "a-b", "x" * 32])
def test_usernames(name: str) -> None:
    """What useradd takes, capitals and dots too."""
    assert is_username(name)


@pytest.mark.parametrize("name", ["", "-a", "1a", "a b", "a:b", "a/b", "a\n", "ä", "x" * 33, ".."])
def test_not_usernames(name: str) -> None:
    """Nothing that could break a line, a path or an option."""
    assert not is_username(name)


_LINE = st.text(st.characters(blacklist_characters="\n"), max_size=20)


@given(st.lists(_LINE), st.lists(_LINE), st.lists(_LINE))
def test_any_files(passwd: list[str], group: list[str], shadow: list[str]) -> None:
    """Either refused, or every line that was there is still there and a second time is the same."""
    files = AccountFiles(
        "\n".join(["root:x:0:0::/:/bin/sh", *passwd, ""]),
        "\n".join(["root:x:0:", *group, ""]),
        "\n".join([*shadow, ""]),
        None,
    )
    try:
        made = _plan(files)
    except AccountError:
        return
    assert find_user(made.files.passwd, 1000) == made.user
    assert set(files.passwd.split("\n")) <= set(made.files.passwd.split("\n"))
    assert _plan(made.files).files == made.files


def test_names_are_taken_out() -> None:
    """Where they stand by themselves, so that short ones do not garble the rest."""
    assert without_name("cannot write /home/u/.bashrc: u", "u") == (
        "cannot write /home/$USERNAME/.bashrc: $USERNAME"
    )
    assert without_name("nothing", "") == "nothing"
