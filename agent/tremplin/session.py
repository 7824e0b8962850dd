"""What everything in tremplin shares: LXD, the reporter, the settings, the operations under way."""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple

from agent.syscalls import syncfs
from agent.tremplin.image_source import KnownImages
from agent.tremplin.inits import Inits
from agent.tremplin.journal import Journal
from agent.tremplin.lifecycle import Lifecycle
from agent.tremplin.lxd_client import LxdClient, LxdNotFoundError
from agent.tremplin.lxd_operations import LxdOperations
from agent.tremplin.names_in_use import NamesInUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any, TypeVar

    from agent.options import Options
    from agent.tremplin.operation import Operation
    from agent.tremplin.reporter import Reporter

    OperationT = TypeVar("OperationT", bound=Operation)


class Settings(NamedTuple):
    """The options of tremplin that its parts need; directories are absolute paths."""

    lxd_dir: str
    lxd_subnet: str | None
    token_dir: str
    shared_dir: str
    resolv_conf: str
    run_dir: str
    download_timeout: float
    """Seconds without a byte until a download is given up."""
    start_heartbeat: float
    """Seconds between two reports of a container that is still starting."""
    image_certificate: str | None
    """File with the one certificate that https image servers are verified against; None: LXD's."""

    @classmethod
    def from_options(cls, options: Options) -> Settings:
        """Reads the options that were given and the defaults of the others."""
        return cls(
            lxd_dir=options["tremplin.lxd_dir"],
            lxd_subnet=options["tremplin.lxd_subnet"],
            token_dir=options["tremplin.token_dir"],
            shared_dir=options["tremplin.shared_dir"],
            resolv_conf=options["tremplin.resolv_conf"],
            run_dir=options["tremplin.run_dir"],
            download_timeout=options["tremplin.download_timeout"],
            start_heartbeat=options["tremplin.start_heartbeat"],
            image_certificate=options["tremplin.image_certificate"],
        )


class Session:
    """One LXD, one host, and what is going on between them."""

    def __init__(self, settings: Settings, client: LxdClient, reporter: Reporter) -> None:
        self.settings = settings
        self.lxd = client
        self.lxd_operations = LxdOperations(client)
        self.inits = Inits(client)
        self.reporter = reporter
        self.left_overs_removed = False
        """Whether nothing is left of creations by a tremplin that was killed."""
        self.names_in_use = NamesInUse()
        self.known_images = KnownImages()
        self.import_lock = asyncio.Lock()
        self.image_lock = asyncio.Lock()
        """Held while the images of an earlier boot are looked through."""
        self.lxd_is_up = asyncio.Event()
        """Set while LXD's events flow."""
        self.lifecycle = Lifecycle(self)
        self.journal = Journal(f"{settings.run_dir}/tremplin-operations.json")
        self.running: set[Operation] = set()
        """Our long operations that have not ended."""
        self.latest: dict[str, Operation] = {}
        """The last one of each container, ended or not."""
        self._background: set[asyncio.Task[None]] = set()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Begins work for which nobody waits, and which deals with its errors itself."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def operation(self, kind: type[OperationT], container: str) -> OperationT | None:
        """The operation of that kind that is under way on a container."""
        for operation in self.running:
            if isinstance(operation, kind) and operation.container == container:
                return operation
        return None

    def flush(self) -> None:
        """Writes to the disk what the containers' files hold; blocks.

        Raises OSError.
        """
        descriptor = os.open(self.settings.lxd_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            syncfs(descriptor)
        finally:
            os.close(descriptor)

    def begun_by(self, method: str, container: str) -> list[Operation]:
        """The operations begun by that RPC that are under way on a container."""
        return [
            operation
            for operation in self.running
            if operation.method == method and operation.container == container
        ]

    async def ended(self, method: str, container: str) -> None:
        """Returns when no operation begun by that RPC is under way on a container."""
        for operation in self.begun_by(method, container):
            await operation.ended.wait()

    async def instances(self) -> list[dict[str, Any]]:
        """LXD's descriptions of all containers. Raises LxdError."""
        found: list[dict[str, Any]] = await self.lxd.get("instances", params={"recursion": "1"})
        return found

    async def instance(self, container: str) -> dict[str, Any] | None:
        """LXD's description of a container, or None. Raises LxdError."""
        try:
            found = await self.lxd.get("instances", container)
        except LxdNotFoundError:
            return None
        assert isinstance(found, dict)
        return found
