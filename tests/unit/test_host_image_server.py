"""The http server of container images."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from pathlib import Path

import pytest

from host.errors import HostError
from host.image_server import ImageServer


def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_serves_files_only(tmp_path: Path) -> None:
    """Files come as they are; directories, missing files and paths out of it do not."""
    (tmp_path / "served" / "sub").mkdir(parents=True)
    (tmp_path / "served" / "sub" / "file").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "secret").write_text("secret")
    with ImageServer(tmp_path / "served") as server:
        assert _get(server.port, "/sub/file") == (200, bytes(range(256)) * 1000)
        for path in ("/", "/sub/", "/nothing", "/../secret", "/%2e%2e/secret"):
            assert _get(server.port, path)[0] in {301, 404}
        assert server.guest_url == f"http://10.0.2.2:{server.port}"


def test_port_taken(tmp_path: Path) -> None:
    """The error says which port."""
    with (
        ImageServer(tmp_path) as server,
        pytest.raises(HostError, match=f"cannot serve images on port {server.port}: Address"),
    ):
        ImageServer(tmp_path, port=server.port)


def test_rate_is_kept_and_a_slow_transfer_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """A file takes as long as its rate says; closing does not wait for transfers."""
    (tmp_path / "file").write_bytes(bytes(300_000))
    with ImageServer(tmp_path, rate=1_000_000) as server:
        began = time.monotonic()
        assert len(_get(server.port, "/file")[1]) == 300_000
        assert time.monotonic() - began >= 0.2
        server.set_rate(1000)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/file")
        answer = connection.getresponse()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    answer.close()
    connection.close()


def test_many_connections(tmp_path: Path) -> None:
    """They do not use up the program's threads and descriptors; when they are gone it serves."""
    (tmp_path / "file").write_bytes(b"content")
    with ImageServer(tmp_path) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        many = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(80)]
        for connection in many[64:]:
            assert connection.recv(1) == b""
        assert threading.active_count() < 75
        for connection in many:
            connection.close()
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert _get(server.port, "/file") == (200, b"content")
                return
            assert time.monotonic() < deadline
