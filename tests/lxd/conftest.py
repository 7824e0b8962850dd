"""A real LXD for a whole session of tests, in namespaces of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.lxd.host import Host, Tremplin
from tests.lxd.machine import new_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lxd.machine import Machine


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """Namespaces with LXD and an image server in them."""
    if os.geteuid() != 0:
        pytest.fail("these tests make namespaces and cgroups: run them as root")
    with new_machine() as machine:
        machine.start_lxd()
        machine.serve_images()
        yield machine


@pytest.fixture(scope="session")
def host(machine: Machine) -> Iterator[Host]:
    """The host's listener."""
    host = Host(machine.directory / "host.sock")
    yield host
    host.stop()


@pytest.fixture(scope="session")
def shared_tremplin(machine: Machine, host: Host) -> Tremplin:
    """One tremplin for all tests that leave it as it is."""
    return Tremplin(machine, host, download_timeout="3")


@pytest.fixture
def tremplin(shared_tremplin: Tremplin) -> Iterator[Tremplin]:
    """Tremplin on an LXD without containers; both run again after a test that killed them."""
    # Of a container with the same name, perhaps.
    shared_tremplin.host.reports.clear()
    yield shared_tremplin
    shared_tremplin.host.hooks.clear()
    machine = shared_tremplin.machine
    machine.behave()
    if not machine.lxd_runs():
        machine.start_lxd()
    if shared_tremplin.ended() is not None:
        shared_tremplin.start()
    machine.remove_containers()


@pytest.fixture
def no_images(tremplin: Tremplin) -> None:
    """LXD has to get every image anew."""
    tremplin.machine.forget_images()
