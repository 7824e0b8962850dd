"""The life of many containers at once, beside as many calls as many runs of lxc."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

from agent.pb import tremplin_pb2 as pb
from benchmarks.figures import Figure
from benchmarks.lxc import Lxc, ratio, rss, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lxd.host import Tremplin
    from tests.lxd.machine import Machine

_MANY = 50
_HUNG_SECONDS = 60
_HUNG = "124"
"""How timeout(1) says so."""
_SETTLING_SECONDS = 10
"""Until tremplin looks at the containers' ports as seldom as it ever does."""
_IDLE_SECONDS = 20


def many_containers(machine: Machine, tremplin: Tremplin, idle: float) -> Iterator[Figure]:
    """The figures. idle: what tremplin had resident before, in MB."""
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

    created = timed(
        all_told(
            "CreateContainer", "UpdateCreateStatus", image_server=server, image_alias="busybox"
        )
    )
    started = timed(all_told("StartContainer", "UpdateStartStatus"))
    assert list(machine.containers().values()).count("Running") == _MANY
    looked = timed(all_told("GetContainerInfo", ""))
    listed = timed(lambda: Lxc(machine)("list", "--format", "csv"))
    ports = _ports_of_many(machine, tremplin, ours)
    resident = rss(machine, tremplin)
    idle_time = _idle_processor_time(machine, tremplin)
    stopped = timed(all_told("StopContainer", "UpdateStopStatus"))
    deleted = timed(all_told("DeleteContainer", "UpdateDeletionStatus"))
    assert machine.containers() == {}
    pairs = {
        "create": (created, f"lxc init {image} theirs$n"),
        "start": (started, "lxc start theirs$n"),
        "stop": (stopped, "lxc stop theirs$n"),
        "delete": (deleted, "lxc delete theirs$n"),
    }
    for what, (elapsed, command) in pairs.items():
        theirs = _lxc(machine, command)
        line = f"{what} {_MANY} at once, each"
        if theirs is None:
            yield Figure(
                f"{line}; a run of lxc hung: measure again",
                {"tremplin": elapsed / _MANY, "lxc": None},
                "ms",
            )
        else:
            yield ratio(line, elapsed / _MANY, theirs / _MANY)
    yield ratio(f"GetContainerInfo, {_MANY} at once, each; lxc list", looked / _MANY, listed)
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


def _lxc(machine: Machine, command: str) -> float | None:
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
