"""maitred's life: listen, VmReady, startup files, crash reports, until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

import grpc.aio

from agent import grpc_endpoint, logs
from agent.maitred import startup
from agent.maitred.servicer import Maitred
from agent.maitred.supervisor import Supervisor
from agent.pb import vm_guest_pb2_grpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine

    from agent.options import Options

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 0.5
"""What calls in flight get at the end; most of what is still there waits for other processes."""


def run(options: Options) -> int:
    """Serves until SIGTERM or SIGINT. The result is the exit code."""
    logs.set_up("maitred")
    try:
        asyncio.run(_serve(options))
    except OSError as error:
        _log.error("cannot start: %s", error)
        return 1
    return 0


async def _serve(options: Options) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)

    run_dir = options["maitred.run_dir"]
    grpc_endpoint.prepare_run_dir(run_dir)
    supervisor = Supervisor(run_dir)
    server = grpc.aio.server()
    servicer = Maitred(options, supervisor)  # type: ignore[abstract]  # the rest: UNIMPLEMENTED
    vm_guest_pb2_grpc.add_MaitredServicer_to_server(servicer, server)
    address = options["maitred.listen"]
    listener = await grpc_endpoint.listen(server, address, run_dir=run_dir, name="maitred")
    _log.info("listening on %s", address)

    tasks = [
        asyncio.create_task(_logged(work, what)) for work, what in _background(options, supervisor)
    ]
    await ended.wait()
    _log.info("ending")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await listener.stop(_GRACE_SECONDS)
    await supervisor.close()


def _background(
    options: Options, supervisor: Supervisor
) -> list[tuple[Coroutine[object, object, None], str]]:
    run_dir = options["maitred.run_dir"]
    works: list[tuple[Coroutine[object, object, None], str]] = []
    if (address := startup.startup_listener(options)) is not None:
        works.append((startup.tell_host(address, run_dir=run_dir), "tell the host of VmReady"))
    if not options["maitred.no_startup_processes"]:
        works.append(
            (
                startup.launch_startup_files(options["maitred.startup_dir"], supervisor),
                "launch the startup files",
            )
        )
    if crashes := options.host_address("maitred.crash_listener", listen="maitred.listen"):

        async def report_crashes() -> None:
            from agent.maitred import crash_reports

            await crash_reports.follow(crashes, run_dir=run_dir)

        works.append((report_crashes(), "report crashes"))
    return works


async def _logged(work: Coroutine[object, object, None], what: str) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        try:
            await work
        except Exception:  # noqa: BLE001  # one background work's trouble is nobody else's
            _log.exception("cannot %s", what)
