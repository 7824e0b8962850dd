"""Requests to LXD: pylxd's client, whose calls block, in worker threads. One request, one answer;
what LXD does in the background afterwards is for lxd_operations.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

from agent.tremplin.lean_pylxd import pylxd, requests
from agent.tremplin.lxd_http import LxdHttp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

_THREADS = 16
"""Requests to LXD in flight at once; none of ours waits for long."""
_SECONDS = 60.0
"""What LXD has to answer a request: long enough for a busy emulated machine."""


class LxdError(Exception):
    """LXD refuses or fails; str() is LXD's reason."""


class LxdNotFoundError(LxdError):
    """What was asked for does not exist."""


class LxdGoneError(LxdError):
    """LXD does not answer, or was restarted while it worked on something."""


class LxdClient:
    """One LXD behind its unix socket."""

    def __init__(self, lxd_dir: str) -> None:
        """lxd_dir: LXD's directory; the socket in it need not exist yet."""
        self.directory = lxd_dir
        self.socket_path = f"{lxd_dir}/unix.socket"
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="lxd")
        # It warns of each connection beyond the one that it keeps.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._http = LxdHttp(self.socket_path)
        self._client: pylxd.Client | None = None
        self._lock = threading.Lock()

    def container_directory(self, container: str) -> str:
        """Where a container's files are: LXD's own link into the storage pool that it is in."""
        return f"{self.directory}/containers/{container}"

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a blocking function, run in one of the threads kept for LXD."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def get(self, *path: str, params: Mapping[str, str] | None = None) -> Any:
        """The metadata of an object; path: what follows /1.0/. Raises LxdError."""
        return (await self.request("get", *path, params=params))["metadata"]

    async def container_log(self, container: str) -> str:
        """The log that liblxc wrote of a container's last start. Raises LxdError."""
        path = ("instances", container, "logs", "lxc.log")
        return str(await self.in_thread(lambda: self.call("get", path, is_api=False).text))

    async def exists(self, *path: str) -> bool:
        """Whether there is such an object. Raises LxdError."""
        try:
            await self.get(*path)
        except LxdNotFoundError:
            return False
        return True

    async def request(
        self,
        method: str,
        *path: str,
        json: Any = None,
        params: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """LXD's whole answer to a request.

        method: "get", "post", "put", "patch" or "delete"; path: what follows /1.0/, unquoted.
        Raises LxdError.
        """
        arguments: dict[str, Any] = {"timeout": _SECONDS}
        if json is not None:
            arguments["json"] = json
        if params:
            arguments["params"] = params
        return await self.in_thread(lambda: self.answer(method, path, **arguments))

    def answer(self, method: str, path: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
        """LXD's whole answer to a request, as request() gives it; blocks.

        arguments: of the requests library. Raises LxdError.
        """
        answer = self.call(method, path, **arguments).json()
        if not isinstance(answer, dict):
            raise LxdError("LXD's answer is not an object")
        return answer

    def call(self, method: str, path: tuple[str, ...], **arguments: Any) -> Any:
        """The answer to a request as requests.Response; blocks. Raises LxdError."""
        try:
            node = self._connected().api
            for segment in path:
                node = node[quote(segment, safe="")]
            return getattr(node, method)(**arguments)
        except pylxd.exceptions.NotFound as error:
            raise LxdNotFoundError(str(error)) from None
        except pylxd.exceptions.LXDAPIException as error:
            raise LxdError(str(error)) from None
        except (pylxd.exceptions.ClientConnectionFailed, requests.RequestException) as error:
            raise LxdGoneError(f"LXD does not answer: {_innermost(error)}") from None

    def internal(self, method: str, path: str, body: dict[str, Any]) -> requests.Response:
        """The answer to a request outside of /1.0; path: what follows /internal/. Blocks.

        Raises LxdError.
        """
        url = f"{self._http.url}/internal/{path}"
        try:
            return self._http.request(method, url, json=body, timeout=_SECONDS)
        except requests.RequestException as error:
            raise LxdGoneError(f"LXD does not answer: {_innermost(error)}") from None

    def _connected(self) -> pylxd.Client:
        with self._lock:
            if self._client is None:
                if not os.path.exists(self.socket_path):
                    raise LxdGoneError(f"LXD does not answer: there is no {self.socket_path}")
                self._client = pylxd.Client(endpoint=self.socket_path, session=self._http)
            return self._client

    def close(self) -> None:
        """Lets go of threads and connections; requests in flight end by themselves."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._http.close()


def _innermost(error: BaseException) -> str:
    while isinstance(error.__context__, OSError):
        error = error.__context__
    text = str(error)
    return text if len(text) < 200 else text[:200] + "…"
