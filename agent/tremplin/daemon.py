"""Tremplin from LXD's first answer to its end: the parts, and the order they come up in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

import grpc.aio

from agent.grpc_endpoint import HostChannel, listen, prepare_run_dir
from agent.pb import tremplin_pb2 as pb
from agent.pb.tremplin_pb2_grpc import add_TremplinServicer_to_server
from agent.tremplin import lxd_process, remap
from agent.tremplin.images import remove_imported_images
from agent.tremplin.imports import put_right
from agent.tremplin.lxd_client import LxdClient, LxdError
from agent.tremplin.lxd_events import EventStream
from agent.tremplin.lxd_recovery import cannot_start, find_containers, reset_database
from agent.tremplin.lxd_setup import set_up_lxd
from agent.tremplin.operation import OperationError
from agent.tremplin.ports import ListeningPorts
from agent.tremplin.reporter import Reporter
from agent.tremplin.resume import resume
from agent.tremplin.servicer import Servicer
from agent.tremplin.session import Session, Settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from agent.options import Address, Options

_log = logging.getLogger(__name__)

_SETUP_RETRY_SECONDS = (0.5, 15.0)
_START_CHECK_SECONDS = 5.0
"""How often to look whether LXD crashes instead of coming up."""
_LXD_AWAY_SECONDS = 60.0
"""After so long without LXD what it was doing is reported as failed."""
_STOP_SECONDS = 1.8
"""How long to stay and tell the host of what goes down, at the end of the VM."""
_LOOK_AGAIN_SECONDS = 0.2
_FAREWELL_SECONDS = 0.2


async def serve(options: Options, inherited: Mapping[Address, int]) -> None:
    """Runs Tremplin until SIGTERM or SIGPWR.

    inherited: from agent.listening.inherited(). Raises OSError: it cannot listen.
    """
    run_dir: str = options["tremplin.run_dir"]
    stopping: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPWR):
        asyncio.get_running_loop().add_signal_handler(number, _stop, stopping, number)
    prepare_run_dir(run_dir)
    address = options.host_address("tremplin.listener", listen="tremplin.listen")
    channel = None
    if address is not None:
        channel = HostChannel(address, run_dir=run_dir, name="tremplin-listener")
    settings = Settings.from_options(options)
    client = LxdClient(settings.lxd_dir)
    reporter = Reporter(None if channel is None else await channel.open())
    session = Session(settings, client, reporter)
    events = asyncio.create_task(_follow(session))
    server = grpc.aio.server()
    add_TremplinServicer_to_server(Servicer(session), server)
    try:
        await _ready(session, stopping)
        listener = None
        if not stopping.done():
            resume(session)
            listener = await listen(
                server,
                options["tremplin.listen"],
                run_dir=run_dir,
                name="tremplin",
                inherited=inherited,
            )
            _log.info("serving on %s", options["tremplin.listen"])
            reporter.report("TremplinReady", pb.TremplinStartupInfo(), container="")
        tidying = asyncio.create_task(_tidy(session))
        watching = asyncio.create_task(ListeningPorts(session).run())
        if await stopping is signal.SIGPWR:
            await _stop_containers(session)
        tidying.cancel()
        watching.cancel()
        if listener is not None:
            await listener.stop(_FAREWELL_SECONDS)
    finally:
        events.cancel()
        await reporter.close(timeout=_FAREWELL_SECONDS)
        if channel is not None:
            await channel.close()
        client.close()


def _stop(stopping: asyncio.Future[signal.Signals], number: signal.Signals) -> None:
    if not stopping.done():
        stopping.set_result(number)


async def _follow(session: Session) -> None:
    giving_up: asyncio.TimerHandle | None = None

    async def connected() -> None:
        try:
            instances = await session.instances()
            session.names_in_use.catch_up(instances)
            session.lifecycle.catch_up(instances)
            await session.lxd_operations.catch_up()
        except LxdError as error:
            raise ConnectionError(str(error)) from None
        session.lxd_is_up.set()
        if giving_up is not None:
            giving_up.cancel()

    def on_event(event: dict[str, Any]) -> None:
        metadata = event.get("metadata") or {}
        if event.get("type") == "operation":
            session.lxd_operations.on_event(metadata)
        elif event.get("type") == "lifecycle":
            session.names_in_use.on_event(metadata)
            session.lifecycle.on_event(metadata, str(event["timestamp"]))

    def lost() -> None:
        nonlocal giving_up
        session.lxd_is_up.clear()
        session.names_in_use.know_nothing()
        if giving_up is not None:
            giving_up.cancel()
        giving_up = asyncio.get_running_loop().call_later(
            _LXD_AWAY_SECONDS, session.lxd_operations.give_up
        )

    stream = EventStream(
        session.lxd.socket_path, on_event=on_event, on_connected=connected, on_lost=lost
    )
    try:
        await stream.run()
    finally:
        if giving_up is not None:
            giving_up.cancel()


async def _ready(session: Session, stopping: asyncio.Future[signal.Signals]) -> None:
    # Returns when LXD is up and set up, or when we are to stop.
    delay = _SETUP_RETRY_SECONDS[0]
    problem = ""
    recovered = False
    while not stopping.done():
        up = asyncio.ensure_future(session.lxd_is_up.wait())
        either: list[asyncio.Future[Any]] = [up, stopping]
        await asyncio.wait(
            either, timeout=_START_CHECK_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        up.cancel()
        if stopping.done():
            return
        if not session.lxd_is_up.is_set():
            if not recovered and await cannot_start(session):
                recovered = True
                await _recover(session)
            continue
        try:
            if not problem:
                _log.info("LXD answers")
            await find_containers(session)
            await set_up_lxd(session)
        except LxdError as error:
            if problem != str(error):
                problem = str(error)
                _log.error("cannot set up LXD: %s", problem)
            await asyncio.wait([stopping], timeout=delay)
            delay = min(delay * 2, _SETUP_RETRY_SECONDS[1])
        else:
            return


async def _recover(session: Session) -> None:
    _log.error("LXD does not start; its database is reset")
    session.reporter.report(
        "UpdateStartLxdStatus",
        pb.StartLxdProgress(status=pb.StartLxdProgress.RECOVERING),
        container="",
    )
    try:
        await reset_database(session)
    except (LxdError, OperationError) as error:
        _log.error("cannot reset LXD's database: %s", error)


async def _tidy(session: Session) -> None:
    try:
        await remove_imported_images(session)
        if not session.import_lock.locked():
            await put_right(session)
        await remap.tidy(session)
    except (LxdError, OSError) as error:
        _log.warning("cannot remove what an earlier tremplin left: %s", error)


async def _stop_containers(session: Session) -> None:
    # LXD stops what is not down by then, with its own, longer limit; meanwhile the host is told.
    running = await _running(session)
    if not running:
        return
    _log.info("stopping %d containers", len(running))
    stops: list[asyncio.Task[Any]] = []
    if not await asyncio.to_thread(lxd_process.stop, session.settings.run_dir):
        stop = {"action": "stop", "force": False, "timeout": 10}
        stops += [
            asyncio.create_task(
                session.lxd_operations.run("put", "instances", name, "state", json=stop)
            )
            for name in running
        ]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            while await _running(session):
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    for each in stops:
        each.cancel()
    await asyncio.gather(*stops, return_exceptions=True)


async def _running(session: Session) -> list[str]:
    """The containers that run; none when LXD does not say."""
    try:
        instances = await session.instances()
    except LxdError:
        return []
    return [found["name"] for found in instances if found["status"] == "Running"]
