"""maitred's life: listen, VmReady, startup files, crash reports, until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal

import grpc.aio

from agent import grpc_endpoint, logs, standard_services
from agent.lazy_service import LazyService
from agent.maitred import startup
from agent.maitred.supervisor_connection import SupervisorConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from agent.lazy_service import Registrar
    from agent.options import Address, Options

_log = logging.getLogger(__name__)

_SERVICE = "vm_tools.Maitred"

_GRACE_SECONDS = 0.5
"""What calls in flight get at the end; most of what is still there waits for other processes."""

_HEAD_START_SECONDS = 0.5
"""How long the host has to answer VmReady before the rest is loaded, which delays everything."""


def run(options: Options, inherited: Mapping[Address, int]) -> int:
    """Serves until SIGTERM or SIGINT. The result is the exit code.

    inherited: from agent.listening.inherited().
    """
    logs.set_up("maitred")
    try:
        asyncio.run(_serve(options, inherited))
    except OSError as error:
        _log.error("cannot start: %s", error)
        return 1
    return 0


async def _serve(options: Options, inherited: Mapping[Address, int]) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)

    run_dir = options["maitred.run_dir"]
    grpc_endpoint.prepare_run_dir(run_dir)
    supervisor = SupervisorConnection(run_dir)
    service = LazyService(_SERVICE, lambda registrar: _load(registrar, options, supervisor))
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service,))
    standard_services.add_to(server, _SERVICE)
    address = options["maitred.listen"]
    listener = await grpc_endpoint.listen(
        server, address, run_dir=run_dir, name="maitred", inherited=inherited
    )
    _log.info("listening on %s", address)

    background = asyncio.create_task(_work_in_background(options, supervisor, service))
    await ended.wait()
    _log.info("ending")
    background.cancel()
    await asyncio.gather(background, return_exceptions=True)
    await listener.stop(_GRACE_SECONDS)
    await supervisor.close()


def _load(registrar: Registrar, options: Options, supervisor: SupervisorConnection) -> None:
    from agent.maitred.servicer import Maitred
    from agent.pb import vm_guest_pb2_grpc

    servicer = Maitred(options, supervisor)
    vm_guest_pb2_grpc.add_MaitredServicer_to_server(servicer, registrar)  # type: ignore[arg-type]  # has all it uses


async def _work_in_background(
    options: Options, supervisor: SupervisorConnection, service: LazyService
) -> None:
    run_dir = options["maitred.run_dir"]
    async with asyncio.TaskGroup() as group:
        if (address := startup.startup_listener(options)) is not None:
            telling = group.create_task(
                _logged(startup.tell_host(address, run_dir=run_dir), "tell the host of VmReady")
            )
            # The host may do all of its work before it answers; what needs no answer goes on.
            await asyncio.wait({telling}, timeout=_HEAD_START_SECONDS)
        service.load()
        if not options["maitred.no_startup_processes"]:
            files = startup.launch_startup_files(options["maitred.startup_dir"], supervisor)
            group.create_task(_logged(files, "launch the startup files"))
        group.create_task(_logged(_launch_companions(options, supervisor), "launch companions"))
        if crashes := options.host_address("maitred.crash_listener", listen="maitred.listen"):
            from agent.maitred import crash_reports

            reports = crash_reports.follow(crashes, run_dir=run_dir)
            group.create_task(_logged(reports, "report crashes"))


async def _launch_companions(options: Options, supervisor: SupervisorConnection) -> None:
    from agent.maitred import companions

    await companions.launch(options, supervisor)


async def _logged(work: Coroutine[object, object, None], what: str) -> None:
    try:
        await work
    except Exception:  # noqa: BLE001  # one background work's trouble is nobody else's
        _log.exception("cannot %s", what)
