"""Requests to LXD as they go over its unix socket, with a server at the other end that goes away,
falls silent or answers in pieces when it is told to.
"""

from __future__ import annotations

import json
import socketserver
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import pytest

from agent.tremplin.lxd_client import LxdClient, LxdError, LxdGoneError, LxdNotFoundError
from agent.tremplin.lxd_http import LxdHttp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.connections = 0
        self.asked_slowly = threading.Event()
        self.let_go = threading.Event()

    def get_request(self) -> tuple[Any, Any]:
        self.connections += 1
        return super().get_request()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = json.loads(content) if content else None
        echo = {"type": "sync", "metadata": [self.command, self.path, asked], "error": "not today"}
        body = json.dumps(echo).encode()
        kind = self.path.rsplit("/", 1)[-1]
        if kind in {"slow", "silence"}:
            self.server.asked_slowly.set()
            self.server.let_go.wait()
        if kind == "silence":
            return
        self.send_response({"missing": 404, "refused": 500}.get(kind, 200))
        if kind == "pieces":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(body), 7):
                piece = body[start : start + 7]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:5] if kind == "cut" else body)
        # Without a word: the client takes the connection for one that can be used again.
        self.close_connection = kind in {"cut", "last"}

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815  the library's names

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    with _Server(tmp_path / "unix.socket") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.let_go.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server: _Server, tmp_path: Path) -> Iterator[LxdClient]:
    client = LxdClient(str(tmp_path))
    assert client.answer("get", ())["metadata"] == ["GET", "/1.0", None]
    assert server.connections == 1
    yield client
    client.close()


def test_one_connection(client: LxdClient, server: _Server) -> None:
    """It carries request after request; names are quoted, parameters and content arrive."""
    for method in ("post", "put", "patch", "delete"):
        answer = client.answer(method, ("a b/c",), json={"key": "ü"}, params={"x": "1&2"})
        assert answer["metadata"] == [method.upper(), "/1.0/a%20b%2Fc?x=1%262", {"key": "ü"}]
    assert client.answer("get", ("pieces",))["metadata"] == ["GET", "/1.0/pieces", None]
    with pytest.raises(LxdNotFoundError, match="not today"):
        client.answer("get", ("missing",))
    with pytest.raises(LxdError, match="not today"):
        client.answer("post", ("refused",), json={})
    assert client.internal("post", "there", {"a": 1}).json()["metadata"][1] == "/internal/there"
    assert server.connections == 1


def test_connection_ended_meanwhile(client: LxdClient, server: _Server) -> None:
    """An LXD that was started again has closed what was open; nobody notices."""
    client.answer("get", ("last",))
    assert client.answer("get", ("next",))["metadata"][1] == "/1.0/next"
    assert server.connections == 2


def test_answer_cut_off(client: LxdClient, server: _Server) -> None:
    """That is an LXD that is gone, and the connection is not used again."""
    with pytest.raises(LxdGoneError, match="LXD does not answer: "):
        client.answer("get", ("cut",))
    client.answer("get", ("next",))
    assert server.connections == 2


def test_silence(client: LxdClient, server: _Server) -> None:
    """Somebody who never answers is given up."""
    with pytest.raises(LxdGoneError, match="timed out"):
        client.answer("get", ("silence",), timeout=0.05)
    client.answer("get", ("next",), timeout=60)
    assert server.connections == 2


def test_many_threads(client: LxdClient, server: _Server) -> None:
    """Each gets its own answer, over no more connections than there are threads."""
    names = [f"name{number}" for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: client.answer("get", (name,)), names))
    assert [answer["metadata"][1] for answer in answers] == [f"/1.0/{name}" for name in names]
    assert server.connections <= 9


def test_nobody_there(tmp_path: Path) -> None:
    """A socket without an LXD."""
    with _Server(tmp_path / "unix.socket"):
        pass
    client = LxdClient(str(tmp_path))
    with pytest.raises(LxdGoneError, match="Connection refused"):
        client.answer("get", ())
    client.close()


def test_closed(server: _Server, tmp_path: Path) -> None:
    """Closing ends what is idle, and what comes to its end later: no socket is left open."""
    http = LxdHttp(str(tmp_path / "unix.socket"))
    with ThreadPoolExecutor(1) as thread:
        request = thread.submit(http.get, f"{http.url}/1.0/slow", timeout=60)
        server.asked_slowly.wait()
        assert http.get(f"{http.url}/1.0").json()["metadata"][1] == "/1.0"
        http.close()
        server.let_go.set()
        assert request.result().json()["metadata"][1] == "/1.0/slow"
    assert server.connections == 2
