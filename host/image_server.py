"""Serves a directory of container images (simplestreams) over http to the guest, which reaches
this machine's 127.0.0.1 as 10.0.2.2. Not a web server for anything else.
"""

from __future__ import annotations

import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from host.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

GUEST_VIEW_OF_HOST = "10.0.2.2"
"""The address under which QEMU's user network shows the host's loopback (QEMU, -netdev user)."""

_CHUNK = 1 << 16
_CONNECTIONS = 64
"""At once. Any container can make them, and each costs the program that keeps the VM a thread and a
descriptor."""
_IDLE_SECONDS = 60.0


class _Handler(SimpleHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are not logged."""

    def list_directory(self, path: Any) -> None:  # noqa: ARG002
        """Simplestreams needs no listings."""
        self.send_error(404)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Sends a file, no faster than the server's rate."""
        try:
            self.connection.settimeout(None)  # a guest may stand still in a download
            self.server.send(source, outputfile)
            self.connection.settimeout(_IDLE_SECONDS)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = _CONNECTIONS
    rate: float | None = None
    stopped: threading.Event

    def __init__(self, *args: Any) -> None:
        self._room = threading.Semaphore(_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a connection, or closes it when there are too many."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def send(self, source: BinaryIO, target: BinaryIO) -> None:
        began, sent = time.monotonic(), 0
        while data := source.read(_CHUNK):
            target.write(data)
            sent += len(data)
            if self.rate is not None:
                ahead = sent / self.rate - (time.monotonic() - began)
                if ahead > 0 and self.stopped.wait(ahead):
                    return

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""


class ImageServer:
    """A server on 127.0.0.1; a context manager."""

    def __init__(self, directory: Path, *, port: int = 0, rate: float | None = None) -> None:
        """directory: what is served; port: 0 for any free one.

        rate: bytes per second for each file, to try out slow links; None for no limit.
        Raises HostError when the port is taken.
        """

        def handler(*args: Any) -> _Handler:
            return _Handler(*args, directory=str(directory))

        try:
            self._server = _Server(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise HostError(f"cannot serve images on port {port}: {reason}") from None
        self._server.rate = rate
        self._server.stopped = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def port(self) -> int:
        """The TCP port."""
        return self._server.server_port

    @property
    def guest_url(self) -> str:
        """The server's URL as seen from inside the VM."""
        return f"http://{GUEST_VIEW_OF_HOST}:{self.port}"

    def set_rate(self, rate: float | None) -> None:
        """Changes the bytes per second of files that are sent from now on."""
        self._server.rate = rate

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
