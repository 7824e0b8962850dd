"""What LXD is started with."""

from __future__ import annotations

import pytest

from agent.option_table import TREMPLIN
from agent.options import parse
from agent.tremplin.lxd_process import environment


@pytest.mark.parametrize(
    ("words", "only"), [([], "true"), (["tremplin.allow_privileged=yes"], "false")]
)
def test_privileged_containers_are_refused_unless_allowed(words: list[str], only: str) -> None:
    """By LXD itself, through its environment."""
    assert environment(parse(words, TREMPLIN))["LXD_UNPRIVILEGED_ONLY"] == only
