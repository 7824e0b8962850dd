"""PID 1 beside tini, dumb-init, s6, runit and supervisord, each as PID 1 of a PID namespace.

Medians of ROUNDS rounds. Our PID 1 runs as in the guest, without site, and with an idle program in
maitred's place; the services are the same small C program everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.process_supervisor.client import AsyncClient, Client
from benchmarks.contestants import (
    DUMB_INIT,
    OURS,
    PROGRAMS,
    PYTHON,
    REPOSITORY,
    RUNIT,
    S6,
    SUPERVISORD,
    TINI,
    Contestant,
    build,
    contestant,
    directory,
    fifo,
    status,
    until,
)
from benchmarks.figures import Figure

ROUNDS = 5
ORPHANS = 10_000
LAUNCHES = 100
SERVICES = 1000
KILLED = 10
MANY_LAUNCHES = 100_000
IDLE_SECONDS = 60.0

BARE = "bare Python"


def run() -> Iterator[Figure]:
    """All figures."""
    build()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    yield orphans()
    yield launch_and_exit()
    yield kill_to_successor()
    yield from thousand_services()
    yield shutdown()
    yield maitred_killed()
    yield from idle()
    yield from many_launches()


def median(measure: Callable[[], float]) -> float:
    """The median of ROUNDS measurements."""
    return statistics.median(measure() for _ in range(ROUNDS))


def orphans() -> Figure:
    """Reaping."""

    def measure(name: str) -> float:
        with directory() as path:
            argv = [str(PROGRAMS / "orphans"), str(ORPHANS), str(path / "result")]
            once = ["sh", "-c", f"'{' '.join(argv)}; sleep 1000'"]
            if name in {OURS, TINI, DUMB_INIT}:
                once = ["sh", "-c", f"{' '.join(argv)}; sleep 1000"]
            with contestant(name, {"orphans": once}):
                until((path / "result").exists, 120)
            return float((path / "result").read_text())

    names = (OURS, TINI, DUMB_INIT, S6)
    # Round by round, so that a machine that is busy is so for all.
    rounds = [{name: measure(name) for name in names} for _ in range(ROUNDS)]
    values: dict[str, float | None] = {
        name: statistics.median(result[name] for result in rounds) for name in names
    }
    values[SUPERVISORD] = measure(SUPERVISORD)  # once: it needs minutes
    ratio = statistics.median(result[OURS] / result[TINI] for result in rounds)
    what = f"{ORPHANS} orphans until none is left"
    return Figure(what, values, "s", f"≤ 1.1 × tini: {ratio:.2f}", ratio <= 1.1)


def launch_and_exit() -> Figure:
    """The price of the control socket."""
    bare_program = (
        "import os, time\n"
        "t = []\n"
        f"for _ in range({LAUNCHES}):\n"
        "    s = time.perf_counter()\n"
        "    os.waitpid(os.posix_spawn('/bin/true', ['/bin/true'], {}), 0)\n"
        "    t.append(time.perf_counter() - s)\n"
        f"print(sorted(t)[{LAUNCHES // 2}])"
    )

    def bare() -> float:
        command = [PYTHON, "-I", "-S", "-c", bare_program]
        return 1000 * float(subprocess.run(command, capture_output=True, check=True).stdout)

    def ours() -> float:
        with contestant(OURS, {}) as running, Client.connect(f"{running.directory}/run") as client:
            times = []
            for _ in range(LAUNCHES):
                started = time.perf_counter()
                client.launch(["/bin/true"], wait=True)
                times.append(time.perf_counter() - started)
            return 1000 * statistics.median(times)

    # In many short rounds, side by side, so that a machine that is busy is so for both.
    pairs = [(ours(), bare()) for _ in range(4 * ROUNDS)]
    values: dict[str, float | None] = {
        OURS: statistics.median(pair[0] for pair in pairs),
        BARE: statistics.median(pair[1] for pair in pairs),
    }
    ratio = statistics.median(mine / its for mine, its in pairs)
    return Figure(
        "launch and exit of /bin/true, p50", values, "ms", f"≤ 2 × bare: {ratio:.2f}", ratio <= 2
    )


def kill_to_successor() -> Figure:
    """Respawning."""

    def measure(name: str) -> float:
        with fifo() as reports:
            service = [str(PROGRAMS / "service"), str(reports.path)]
            times = []
            with contestant(name, {f"service{n}": service for n in range(KILLED)}) as running:
                pids = [reports.next()[0] for _ in range(KILLED)]
                # s6 and runit hold back a service that ran for less than a second.
                time.sleep(1.5)
                for inner in pids:
                    pid = running.outer_pid(inner)
                    killed = time.monotonic()
                    os.kill(pid, signal.SIGKILL)
                    times.append(reports.next()[1] - killed)
            return 1000 * statistics.median(times)

    values: dict[str, float | None] = {
        name: median(functools.partial(measure, name)) for name in (OURS, S6, RUNIT, SUPERVISORD)
    }
    ours = values[OURS]
    assert ours
    ahead = all(value is None or ours <= value for value in values.values())
    return Figure(
        "kill -9 to the successor running, p50",
        values,
        "ms",
        "≤ 5 ms, ahead of s6, runit, supervisord",
        ours <= 5 and ahead,
    )


def thousand_services() -> Iterator[Figure]:
    """Start and memory."""
    times: dict[str, float | None] = {}
    memory: dict[str, float | None] = {}

    def measure(name: str) -> tuple[float, float]:
        with fifo() as reports:
            service = [str(PROGRAMS / "service"), str(reports.path)]
            with contestant(name, {f"service{n}": service for n in range(SERVICES)}) as running:
                for _ in range(SERVICES):
                    last = reports.next()[1]
                return last - running.started, running.memory()

    for name in (OURS, S6, RUNIT, SUPERVISORD):
        results = [measure(name) for _ in range(ROUNDS)]
        times[name] = statistics.median(result[0] for result in results)
        memory[name] = statistics.median(result[1] for result in results)
    for what, values, unit in (
        (f"{SERVICES} services until all run", times, "s"),
        (f"RSS of the supervisor with {SERVICES} services, all its processes", memory, "MB"),
    ):
        ours = values[OURS]
        assert ours
        ahead = all((values[peer] or 0) >= ours for peer in (S6, SUPERVISORD))
        yield Figure(what, values, unit, "ahead of s6 and supervisord", ahead)


def shutdown() -> Figure:
    """The way down with services that obey."""

    def measure() -> float:
        with fifo() as reports:
            service = [str(PROGRAMS / "service"), str(reports.path)]
            with contestant(OURS, {f"service{n}": service for n in range(SERVICES)}) as running:
                for _ in range(SERVICES):
                    reports.next()
                started = time.monotonic()
                with Client.connect(f"{running.directory}/run") as client:
                    client.shutdown("benchmark")
                running.wait()
                return time.monotonic() - started

    took = median(measure)
    what = f"shutdown of {SERVICES} services that obey SIGTERM"
    return Figure(what, {OURS: took}, "s", "≤ 2 s", took <= 2)


def maitred_killed() -> Figure:
    """The real maitred: from kill -9 to the next LaunchProcess answered."""
    import grpc

    from agent.pb import vm_guest_pb2, vm_guest_pb2_grpc

    request = vm_guest_pb2.LaunchProcessRequest(argv=["true"], wait_for_exit=True)
    times = []
    with directory() as path:
        address = f"unix:{path}/maitred.sock"
        options = ["maitred.setup=no", f"maitred.run_dir={path}/run", f"maitred.listen={address}"]
        python = str(REPOSITORY / ".venv/bin/python")
        running = Contestant(REPOSITORY, [python, "-m", "agent.process_supervisor", *options])
        channel_options = [
            ("grpc.initial_reconnect_backoff_ms", 20),
            ("grpc.min_reconnect_backoff_ms", 20),
            ("grpc.max_reconnect_backoff_ms", 20),
        ]
        with grpc.insecure_channel(address, options=channel_options) as channel:
            maitred = vm_guest_pb2_grpc.MaitredStub(channel)
            maitred.LaunchProcess(request, wait_for_ready=True, timeout=60)
            with Client.connect(f"{path}/run") as client:
                for _ in range(4 * ROUNDS):
                    started = time.monotonic()
                    client.signal("maitred", "SIGKILL")
                    while True:
                        try:
                            maitred.LaunchProcess(request, wait_for_ready=True, timeout=60)
                            break
                        except grpc.RpcError as error:
                            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                                raise
                    times.append(1000 * (time.monotonic() - started))
        running.close()
    took = statistics.median(times)
    what = "kill -9 of maitred to the next LaunchProcess answered, p50"
    return Figure(what, {OURS: took}, "ms", "≤ 500 ms", took <= 500)


def idle() -> Iterator[Figure]:
    """What it costs to have it."""
    names = (OURS, TINI, DUMB_INIT, S6, RUNIT, SUPERVISORD)
    sleeper = {"sleeper": ["sleep", "100000"]}
    switches: dict[str, float | None] = {}
    memory: dict[str, float | None] = {}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(contestant(name, sleeper)) for name in names}
        time.sleep(5)
        before = {name: there.switches() for name, there in running.items()}
        time.sleep(IDLE_SECONDS)
        for name, there in running.items():
            switches[name] = there.switches() - before[name]
            memory[name] = there.memory()
    command = [PYTHON, "-I", "-S", "-c", "import os; os.write(1, b'x'); os.read(0, 1)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bare:
        assert bare.stdout
        bare.stdout.read(1)
        memory[BARE] = status(bare.pid, "VmRSS") / 1024
        bare.kill()
    ours, floor = memory[OURS], memory[BARE]
    assert ours
    assert floor
    yield Figure(
        f"voluntary context switches in {IDLE_SECONDS:.0f} s idle",
        switches,
        "count",
        "0",
        switches[OURS] == 0,
    )
    ratio = ours / floor
    yield Figure("RSS idle, one service", memory, "MB", f"≤ 1.4 × bare: {ratio:.2f}", ratio <= 1.4)


def many_launches() -> Iterator[Figure]:
    """Nothing is left behind."""

    async def launch(path: Path, count: int) -> None:
        async with await AsyncClient.connect(str(path / "run")) as client:

            async def some() -> None:
                for _ in range(count // 20):
                    await client.launch(["/bin/true"], wait=True)

            await asyncio.gather(*(some() for _ in range(20)))

    with contestant(OURS, {}) as running:
        asyncio.run(launch(running.directory, 1000))
        time.sleep(0.5)
        memory, files = running.memory(), len(os.listdir(f"/proc/{running.pid}/fd"))
        started = time.monotonic()
        asyncio.run(launch(running.directory, MANY_LAUNCHES - 1000))
        took = time.monotonic() - started
        time.sleep(0.5)
        growth = running.memory() - memory
        more_files = len(os.listdir(f"/proc/{running.pid}/fd")) - files
    what = f"{MANY_LAUNCHES} launches, after the first 1000:"
    # 64 kB: the allocator's arenas come and go.
    yield Figure(f"{what} growth of RSS", {OURS: growth}, "MB", "none (< 0.07)", growth < 0.07)
    yield Figure(f"{what} growth of open files", {OURS: more_files}, "count", "0", more_files <= 0)
    yield Figure(f"{what} launches per second", {OURS: (MANY_LAUNCHES - 1000) / took}, "1/s")


if __name__ == "__main__":
    from benchmarks.figures import table

    build()
    results = [globals()[name]() for name in sys.argv[1:]]
    print(table([each for it in results for each in ([it] if isinstance(it, Figure) else it)]))
