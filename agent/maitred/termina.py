"""StartTermina: the stateful disk, then what containers need, as processes of PID 1."""

from __future__ import annotations

import asyncio
import logging
import os

from agent.maitred import ipv4, stateful_disk
from agent.maitred.errors import BadRequest
from agent.options import UnixAddress, VsockAddress, program
from agent.pb import vm_guest_pb2
from agent.process_supervisor.client import SupervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.maitred.supervisor_connection import SupervisorConnection
    from agent.options import Options

_log = logging.getLogger(__name__)

_DEFAULT_DEVICE = "/dev/vdb"
_LXCFS = "/usr/bin/lxcfs"
_LXCFS_DIR = "/var/lib/lxcfs"
_TREMPLIN_STOP_SECONDS = 2.0

Response = vm_guest_pb2.StartTerminaResponse


class Termina:
    """Brings up the containers' services; calling it again finds them up."""

    def __init__(self, options: Options, supervisor: SupervisorConnection) -> None:
        self._options = options
        self._supervisor = supervisor
        self._one_at_a_time = asyncio.Lock()

    async def start(
        self, request: vm_guest_pb2.StartTerminaRequest
    ) -> vm_guest_pb2.StartTerminaResponse:
        """Every failure is in the result, with a reason that a person can act on."""
        response = Response(status=Response.FAILED)
        try:
            subnet = ipv4.check_bridge_subnet(request.lxd_ipv4_subnet)
            device = check_device(request.stateful_device)
            tremplin = self._tremplin_argv(
                str(subnet), allow_privileged=request.allow_privileged_containers
            )
            async with self._one_at_a_time:
                await self._start(response, device=device, tremplin=tremplin)
        except stateful_disk.DiskError as error:
            if error.mount_failed:
                response.mount_result = Response.MOUNT_FAILURE
            response.failure_reason = str(error)
        except (BadRequest, SupervisorError) as error:
            response.failure_reason = str(error)
        except OSError as error:
            what = f"cannot use {error.filename}" if error.filename else "cannot start Termina"
            response.failure_reason = f"{what}: {error.strerror or error}"
        if response.failure_reason:
            _log.error("cannot start Termina: %s", response.failure_reason)
        return response

    async def _start(
        self, response: vm_guest_pb2.StartTerminaResponse, *, device: str, tremplin: list[str]
    ) -> None:
        directory = self._options["maitred.stateful_dir"]
        lost_data = await stateful_disk.mount(device, directory)
        response.mount_result = Response.PARTIAL_DATA_LOSS if lost_data else Response.MOUNT_SUCCESS
        response.free_bytes = stateful_disk.free_bytes(directory)
        _log.info(
            "stateful disk %s at %s, %d MiB free", device, directory, response.free_bytes >> 20
        )
        client = await self._supervisor.client()
        # tremplin takes longest to come up, and needs lxcfs only once a container starts.
        try:
            await client.launch(
                tremplin,
                name="tremplin",
                console=True,
                respawn=True,
                backoff=True,
                listen=[str(self._options["tremplin.listen"])],
                stop_signal="SIGPWR",
                stop_timeout=_TREMPLIN_STOP_SECONDS,
                stop_stage="first",
            )
        except SupervisorError as error:
            if error.code != "EEXIST":
                raise
            raise BadRequest(
                "cannot start tremplin: it runs, with another lxd_ipv4_subnet or "
                "allow_privileged_containers; both stay as they are until the VM is restarted"
            ) from None
        if os.access(_LXCFS, os.X_OK):
            os.makedirs(_LXCFS_DIR, exist_ok=True)
            await client.launch(
                [_LXCFS, _LXCFS_DIR],
                name="lxcfs",
                respawn=True,
                backoff=True,
                stop_stage="last",  # containers look at it until they are down
            )
        response.status = Response.SUCCESS

    def _tremplin_argv(self, subnet: str, *, allow_privileged: bool) -> list[str]:
        given = self._options.given
        words = [word for word in self._options.words() if word.startswith("tremplin.")]
        if isinstance(self._options["maitred.listen"], UnixAddress) and isinstance(
            self._options["tremplin.listen"], VsockAddress
        ):
            raise BadRequest(
                "cannot start tremplin: maitred.listen is a unix socket, and tremplin.listen is "
                "not given, so that it would open a vsock port; give both or neither"
            )
        if "tremplin.run_dir" not in given:
            words.append(f"tremplin.run_dir={self._options['maitred.run_dir']}")
        words.append(f"tremplin.lxd_subnet={subnet}")
        if allow_privileged:
            words.append("tremplin.allow_privileged=yes")
        if command := self._options["tremplin.command"]:
            return [command, *words]
        return program("agent.tremplin", words)


def check_device(path: str) -> str:
    """The stateful device of a request, which may leave it out. Raises BadRequest."""
    device = path or _DEFAULT_DEVICE
    if not device.startswith("/") or "\0" in device:
        raise BadRequest(f"cannot use stateful_device {device!r}: not an absolute path")
    return device
