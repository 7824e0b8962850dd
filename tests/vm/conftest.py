"""What all VM tests share: one event loop, the built guest, the served container images."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from host.build_files import BUILD_DIR, GuestImage, check_container_images
from host.image_server import ImageServer
from tests.vm import vms


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which boots were repeated."""
    for line in vms.repeated:
        terminalreporter.write_line(f"REPEATED BOOT: {line}")


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests, as a VM's sockets live longer than a test."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The guest that `make image` built."""
    return GuestImage.in_directory(BUILD_DIR / "image")


@pytest.fixture(scope="session")
def image_server() -> Iterator[ImageServer]:
    """The images that `make container-image` built."""
    directory = BUILD_DIR / "container-image"
    check_container_images(directory)
    with ImageServer(directory) as server:
        yield server
