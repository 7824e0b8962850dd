"""How pylxd's requests get to LXD: a session of the requests library, which pylxd asks for, with a
short way for what nearly all of them are, JSON over the unix socket. On the usual way, through
requests and urllib3, a request takes this side a millisecond of a processor that LXD needs too.
"""

from __future__ import annotations

import io
import json as json_codec
import socket
from http.client import HTTPConnection, HTTPException
from urllib.parse import quote, urlencode

from agent.tremplin.lean_pylxd import pylxd, requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SHORT = {"json", "params", "timeout", "allow_redirects"}
"""What may be wanted of a request that goes the short way; others stream, or send files."""


class LxdHttp(requests.Session):
    """For pylxd.Client(session=...); for several threads at a time."""

    def __init__(self, socket_path: str) -> None:
        """socket_path: LXD's."""
        super().__init__()
        # No proxy and no .netrc concerns a unix socket.
        self.trust_env = False
        self._socket_path = socket_path
        self.url = f"http+unix://{quote(socket_path, safe='')}"
        """What the URLs of all requests begin with."""
        for prefix, adapter in pylxd.client.get_session_for_url(self.url).adapters.items():
            self.mount(prefix, adapter)
        self._idle: list[_Connection] = []
        self._closed = False

    def request(self, method: str, url: str, **options: Any) -> requests.Response:  # type: ignore[override]  # the same, by name
        """As requests.Session has it. Raises requests.RequestException."""
        given = {key for key, value in options.items() if value is not None}
        if not given <= _SHORT:
            return super().request(method, url, **options)
        target = url.removeprefix(self.url)
        if options.get("params"):
            target += "?" + urlencode(options["params"])
        body, headers = None, {}
        if options.get("json") is not None:
            body = json_codec.dumps(options["json"]).encode()
            headers["Content-Type"] = "application/json"
        connection = self._connection(options.get("timeout"))
        try:
            connection.request(method.upper(), target, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, HTTPException) as error:
            connection.close()
            raise requests.ConnectionError(error) from error
        if answer.will_close:
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:
                self.close()
        response = requests.Response()
        response.status_code = answer.status
        response.url = url
        response.encoding = "utf-8"
        response.raw = io.BytesIO(content)
        return response

    def _connection(self, timeout: float | None) -> _Connection:
        while (connection := self._take_idle()) is not None:
            if connection.is_alive(timeout):
                return connection
            connection.close()
        return _Connection(self._socket_path, timeout)

    def _take_idle(self) -> _Connection | None:
        # Another thread may take the last one at any moment.
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def close(self) -> None:
        """Ends the connections that nobody uses, and others when their requests have ended."""
        super().close()
        self._closed = True
        while (connection := self._take_idle()) is not None:
            connection.close()


class _Connection(HTTPConnection):
    def __init__(self, socket_path: str, timeout: float | None) -> None:
        super().__init__("lxd", timeout=timeout)
        self._socket_path = socket_path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)

    def is_alive(self, timeout: float | None) -> bool:
        # timeout: of the request that is to come. LXD says nothing unasked: there is something to
        # read when it has gone.
        try:
            self.sock.settimeout(0)
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            self.sock.settimeout(timeout)
            return True
        except OSError:
            pass
        return False
