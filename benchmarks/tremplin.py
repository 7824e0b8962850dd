"""Tremplin's operations, from the call to the host's last report, beside the lxc command."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_events import EventStream
from benchmarks.figures import Figure
from host.build_files import BUILD_DIR, check_container_images
from tests.lxd.host import Host, Tremplin
from tests.lxd.machine import Machine, new_machine

_ROUNDS = 12
_DOWNLOADS = 7
_STARTS = 3
_MANY = 50
_BIG_BYTES = 9_000_000
_HUNG_SECONDS = 60
_HUNG = "124"
"""How timeout(1) says so."""
_SETTLING_SECONDS = 10
"""Until tremplin looks at the containers' ports as seldom as it ever does."""
_IDLE_SECONDS = 20
_AS_FAST = 1.05
"""Ours may take so many times as long as lxc."""


def run() -> Iterator[Figure]:
    """Measures on an LXD of its own, ours and lxc in turns."""
    with new_machine() as machine:
        machine.start_lxd()
        machine.serve_images()
        host = Host(machine.directory / "host.sock")
        try:
            yield from _measure(machine, Tremplin(machine, host))
        finally:
            host.stop()


def _measure(machine: Machine, tremplin: Tremplin) -> Iterator[Figure]:
    idle = _rss(machine, tremplin)
    yield from _operations(machine, tremplin)
    yield from _downloads(machine, tremplin)
    yield from _event_delay(machine, tremplin)
    yield from _starts_of_tremplin(machine, tremplin)
    yield from _many(machine, tremplin, idle)


def _timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return 1000 * (time.monotonic() - began)


def _call_and_wait(tremplin: Tremplin, call: str, report: str, name: str) -> Callable[[], object]:
    def action() -> None:
        after = len(tremplin.host.reports)
        tremplin.call(call, container_name=name)
        tremplin.host.wait_for(report, container=name, after=after)

    return action


def _operations(machine: Machine, tremplin: Tremplin) -> Iterator[Figure]:
    server = machine.new_server()
    tremplin.create("ours", server=server)
    machine.remove_containers()
    (image,) = machine.images()
    mark = json.dumps({"properties": {"createdByTremplin": "true"}})
    marking = ("lxc", "query", "-X", "PATCH", "-d", mark, "/1.0/instances/new/metadata")
    names = {
        "create, image there": [],
        "create, mark, rename": [],
        "start": [],
        "stop": [],
        "delete": [],
    }  # type: dict[str, list[tuple[float, float]]]
    for number in range(_ROUNDS):
        pairs = {
            "create, image there": (
                lambda: tremplin.create("ours", server=server),
                lambda: machine.run("lxc", "init", image, "theirs"),
            ),
            "start": (
                _call_and_wait(tremplin, "StartContainer", "UpdateStartStatus", "ours"),
                lambda: machine.run("lxc", "start", "theirs"),
            ),
            "stop": (
                _call_and_wait(tremplin, "StopContainer", "UpdateStopStatus", "ours"),
                lambda: machine.run("lxc", "stop", "theirs"),
            ),
            "delete": (
                _call_and_wait(tremplin, "DeleteContainer", "UpdateDeletionStatus", "ours"),
                lambda: machine.run("lxc", "delete", "theirs"),
            ),
        }
        for name, (ours, theirs) in pairs.items():
            # Who comes first pays for what LXD and the kernel still do for the one before.
            if number % 2:
                names[name].append((_timed(ours), _timed(theirs)))
            else:
                took = _timed(theirs)
                names[name].append((_timed(ours), took))
        # What a host is promised of a creation is more than `lxc init` does.
        init = _timed(lambda: machine.run("lxc", "init", image, "new"))
        init += _timed(lambda: machine.run(*marking))
        init += _timed(lambda: machine.run("lxc", "rename", "new", "named"))
        machine.run("lxc", "delete", "named")
        names["create, mark, rename"].append((names["create, image there"][-1][0], init))
    for name, rounds in names.items():
        yield _beside(name, rounds)
    tremplin.create("ours", server=server)
    info = [
        _timed(lambda: tremplin.call("GetContainerInfo", container_name="ours")) for _ in range(50)
    ]
    lists = [_timed(lambda: machine.run("lxc", "list", "--format", "csv")) for _ in range(9)]
    yield _ratio("GetContainerInfo, lxc list", statistics.median(info), statistics.median(lists))
    machine.remove_containers()


def _beside(what: str, rounds: list[tuple[float, float]]) -> Figure:
    return _ratio(
        what, statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)
    )


def _ratio(what: str, ours: float, theirs: float) -> Figure:
    return Figure(
        what, {"tremplin": ours, "lxc": theirs}, "ms", "≤ 1.05 × lxc", ours <= _AS_FAST * theirs
    )


def _downloads(machine: Machine, tremplin: Tremplin) -> Iterator[Figure]:
    yield _download(tremplin, "9 MB", _BIG_BYTES, "big", machine.new_server)
    debian = BUILD_DIR / "container-image"
    check_container_images(debian)
    (rootfs,) = debian.rglob("debian/**/rootfs.squashfs")
    size = rootfs.stat().st_size
    yield _download(
        tremplin,
        f"Debian, {size // 1_000_000} MB",
        size,
        "debian/bookworm",
        functools.partial(machine.new_server, machine.serve_tree(debian)),
    )


def _download(
    tremplin: Tremplin,
    what: str,
    size: int,
    alias: str,
    server: Callable[[], str],
) -> Figure:
    machine = tremplin.machine
    rates: dict[str, list[float]] = {"tremplin": [], "lxc": []}

    def forget() -> None:
        machine.forget_images()
        # tremplin puts the image on the disk afterwards, lxc leaves that to whoever comes next.
        machine.run("sync")

    for _ in range(_DOWNLOADS):
        forget()
        url = server()
        elapsed = _timed(lambda url=url: tremplin.create("ours", alias=alias, server=url))  # type: ignore[misc]  # bound now
        rates["tremplin"].append(size / elapsed / 1000)
        machine.remove_containers()
        forget()
        # lxc itself takes images from https only; its `query` asks LXD the same as we do.
        body = {
            "name": "theirs",
            "source": {
                "type": "image",
                "mode": "pull",
                "protocol": "simplestreams",
                "server": server(),
                "alias": alias,
            },
        }
        query = ("lxc", "query", "--wait", "-X", "POST", "/1.0/instances", "-d", json.dumps(body))
        elapsed = _timed(lambda query=query: machine.run(*query))  # type: ignore[misc]  # bound now
        rates["lxc"].append(size / elapsed / 1000)
        machine.remove_containers()
    ours, theirs = (statistics.median(rates[name]) for name in ("tremplin", "lxc"))
    return Figure(
        f"create with download: {what}",
        {"tremplin": ours, "lxc": theirs},
        "MB/s",
        "≥ lxc / 1.05",
        ours * _AS_FAST >= theirs,
    )


def _event_delay(machine: Machine, tremplin: Tremplin) -> Iterator[Figure]:
    seen: dict[int, float] = {}

    def on_event(event: dict[str, Any]) -> None:
        text = ((event["metadata"] or {}).get("metadata") or {}).get("download_progress", "")
        if str(text).startswith("rootfs: "):
            seen.setdefault(int(text.split()[1].rstrip("%")), time.monotonic())

    async def connected() -> None:
        ready.set()

    async def listen() -> None:
        stream = EventStream(
            machine.lxd_socket, on_event=on_event, on_connected=connected, on_lost=lambda: None
        )
        running = asyncio.create_task(stream.run())
        while not stop.is_set():
            await asyncio.sleep(0.01)
        running.cancel()

    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    ready.wait()
    machine.forget_images()
    with machine.slow_down(3e6):
        tremplin.create("delay", alias="big")
    stop.set()
    thread.join()
    delays = []
    for report in tremplin.host.reports:
        message = report.message
        if report.method == "UpdateCreateStatus" and message.container_name == "delay":
            percent = message.download_progress
            if message.status == pb.ContainerCreationProgress.DOWNLOADING and percent in seen:
                delays.append(1000 * (report.at - seen.pop(percent)))
    machine.remove_containers()
    delays.sort()
    p99 = delays[int(len(delays) * 0.99) - 1]
    yield Figure(
        "LXD's progress event to the host, p50",
        {"tremplin": statistics.median(delays)},
        "ms",
        "≤ 50 ms",
        statistics.median(delays) <= 50,
    )
    yield Figure(
        "LXD's progress event to the host, p99", {"tremplin": p99}, "ms", "≤ 50 ms", p99 <= 50
    )


def _starts_of_tremplin(machine: Machine, tremplin: Tremplin) -> Iterator[Figure]:
    ours, theirs = [], []
    for _ in range(_STARTS):
        tremplin.kill(signal.SIGTERM)
        machine.kill_lxd()
        theirs.append(_timed(lambda: machine.start_lxd(network=False)))
        ours.append(_timed(tremplin.start))
    yield Figure(
        "exec to TremplinReady, LXD up and formatted; beside it LXD's own start",
        {"tremplin": statistics.median(ours), "lxd": statistics.median(theirs)},
        "ms",
    )


def _many(machine: Machine, tremplin: Tremplin, idle: float) -> Iterator[Figure]:
    """The life of many containers at once: beside as many calls as many runs of lxc."""
    host = tremplin.host
    ours = [f"ours{number}" for number in range(_MANY)]
    server = machine.new_server()
    machine.forget_images()
    tremplin.create("first", server=server)
    machine.remove_containers()
    (image,) = machine.images()

    def all_told(call: str, report: str, **fields: str) -> Callable[[], object]:
        def action() -> None:
            after = len(host.reports)
            request = getattr(pb, f"{call}Request")
            calls = [
                getattr(tremplin.stub, call).future(
                    request(container_name=name, **fields), timeout=300
                )
                for name in ours
            ]
            for one in calls:
                one.result()
            for name in ours if report else []:
                # Of these reports 1 says DOWNLOADING for a creation, else how it ended.
                not_status = 1 if report == "UpdateCreateStatus" else None
                host.wait_for(
                    report, container=name, after=after, seconds=300, not_status=not_status
                )

        return action

    created = _timed(
        all_told(
            "CreateContainer", "UpdateCreateStatus", image_server=server, image_alias="busybox"
        )
    )
    started = _timed(all_told("StartContainer", "UpdateStartStatus"))
    assert list(machine.containers().values()).count("Running") == _MANY
    looked = _timed(all_told("GetContainerInfo", ""))
    listed = _timed(lambda: machine.run("lxc", "list", "--format", "csv"))
    ports = _ports_of_many(machine, tremplin, ours)
    resident = _rss(machine, tremplin)
    idle_time = _idle_processor_time(machine, tremplin)
    stopped = _timed(all_told("StopContainer", "UpdateStopStatus"))
    deleted = _timed(all_told("DeleteContainer", "UpdateDeletionStatus"))
    assert machine.containers() == {}
    pairs = {
        "create": (created, f"lxc init {image} theirs$n"),
        "start": (started, "lxc start theirs$n"),
        "stop": (stopped, "lxc stop theirs$n"),
        "delete": (deleted, "lxc delete theirs$n"),
    }
    for what, (elapsed, command) in pairs.items():
        theirs = _many_lxc(machine, command)
        line = f"{what} {_MANY} at once, each"
        if theirs is None:
            yield Figure(
                f"{line}; a run of lxc hung: measure again",
                {"tremplin": elapsed / _MANY, "lxc": None},
                "ms",
            )
        else:
            yield _ratio(line, elapsed / _MANY, theirs / _MANY)
    yield _ratio(f"GetContainerInfo, {_MANY} at once, each; lxc list", looked / _MANY, listed)
    yield Figure(
        f"a port in each of {_MANY}: from the last one to the host's knowing all",
        {"tremplin": ports},
        "ms",
    )
    yield Figure(
        f"processor time in a minute of idleness with {_MANY} running",
        {"tremplin": idle_time},
        "ms",
    )
    yield Figure(
        f"resident memory idle, with {_MANY} running",
        {"tremplin": idle, f"with {_MANY}": resident},
        "MB",
    )


def _many_lxc(machine: Machine, command: str) -> float | None:
    """The milliseconds that as many runs of lxc at once take; None when one of them hung.

    command: with $n in it. Of so many at once one now and then waits for ever for an event that it
    missed; it is given up, and says nothing about the time that lxc takes.
    """
    one = f"timeout {_HUNG_SECONDS} {command} </dev/null >/dev/null 2>&1; echo $?"
    many = f"for n in $(seq 0 {_MANY - 1}); do ({one}) & done; wait"
    began = time.monotonic()
    exits = machine.run("sh", "-c", many, seconds=300).split()
    elapsed = 1000 * (time.monotonic() - began)
    failed = [code for code in exits if code not in {"0", _HUNG}]
    if failed or len(exits) != _MANY:
        raise RuntimeError(f"cannot measure `{command}`: {len(failed)} of {len(exits)} runs failed")
    return None if _HUNG in exits else elapsed


def _idle_processor_time(machine: Machine, tremplin: Tremplin) -> float:
    """What tremplin needs in a minute in which nothing happens, in ms."""
    process = psutil.Process(machine.inner_pid(tremplin.process))
    time.sleep(_SETTLING_SECONDS)
    before = process.cpu_times()
    time.sleep(_IDLE_SECONDS)
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return 1000 * used * 60 / _IDLE_SECONDS


def _ports_of_many(machine: Machine, tremplin: Tremplin, names: list[str]) -> float:
    listen = "nc -l -p 8125 </dev/null >/dev/null 2>&1 &"
    after = len(tremplin.host.reports)
    for name in names:
        machine.run("lxc", "exec", name, "--", "sh", "-c", listen)
    began = time.monotonic()
    told = tremplin.host.wait_for(
        "UpdateListeningPorts",
        after=after,
        condition=lambda report: set(report.message.container_ports) == set(names),
    )
    return max(0.0, 1000 * (told.at - began))


def _rss(machine: Machine, tremplin: Tremplin) -> float:
    resident: int = psutil.Process(machine.inner_pid(tremplin.process)).memory_info().rss
    return resident / 1024 / 1024
