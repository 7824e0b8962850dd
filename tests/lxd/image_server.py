"""An image server that misbehaves on demand: `python image_server.py TREE PORT BEHAVIOUR_FILE
[CERTIFICATE KEY]`; with a certificate it speaks https.

The first part of every path is passed over, so that each test has a server of its own as far as
LXD, which remembers what it read from a URL, can tell. BEHAVIOUR_FILE holds JSON, read again and
again: {"rate": bytes per second, "stall_after": bytes of a file, "corrupt": true, "down": true}.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_CHUNK = 16 * 1024


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tree: Path
    behaviour_file: Path

    def do_GET(self) -> None:
        """Sends a file of the tree."""
        path = self.tree.joinpath(*self.path.split("?")[0].split("/")[2:])
        down = json.loads(self.behaviour_file.read_text()).get("down", False)
        if down or not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        try:
            self._send(path)
        except OSError:
            self.close_connection = True

    def _send(self, path: Path) -> None:
        is_image = path.suffix == ".squashfs"
        sent = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                behaviour = json.loads(self.behaviour_file.read_text()) if is_image else {}
                while sent >= behaviour.get("stall_after", sent + 1):
                    time.sleep(0.05)
                    behaviour = json.loads(self.behaviour_file.read_text())
                if behaviour.get("corrupt"):
                    chunk = bytes(len(chunk))
                self.wfile.write(chunk)
                sent += len(chunk)
                if "rate" in behaviour:
                    time.sleep(len(chunk) / behaviour["rate"])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing."""


def main(tree: str, port: str, behaviour_file: str, certificate: str = "", key: str = "") -> None:
    """Serves for ever."""
    _Handler.tree = Path(tree)
    _Handler.behaviour_file = Path(behaviour_file)
    with ThreadingHTTPServer(("127.0.0.1", int(port)), _Handler) as server:
        server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            # The handshake is the handler's, or a client that never begins it would hold up others.
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        print("ready", flush=True)  # noqa: T201
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
