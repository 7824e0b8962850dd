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

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_events import EventStream
from benchmarks.figures import Figure
from benchmarks.lxc import AS_FAST, Lxc, beside, in_turns, ratio, rss, timed
from benchmarks.many_containers import many_containers
from host.build_files import BUILD_DIR, check_container_images
from tests.lxd.host import Host, Tremplin
from tests.lxd.machine import Machine, new_machine

_CREATIONS = 40
"""Most of one is LXD's, and the ratio of a dozen is good to a tenth only."""
_ROUNDS = 12
_DOWNLOADS = 7
_STARTS = 3
_BIG_BYTES = 9_000_000


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
    idle = rss(machine, tremplin)
    yield from _operations(machine, tremplin)
    yield from _downloads(machine, tremplin)
    yield from _event_delay(machine, tremplin)
    yield from _starts_of_tremplin(machine, tremplin)
    yield from many_containers(machine, tremplin, idle)


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
    marking = ("query", "-X", "PATCH", "-d", mark, "/1.0/instances/new/metadata")
    lxc = Lxc(machine)
    delete = _call_and_wait(tremplin, "DeleteContainer", "UpdateDeletionStatus", "ours")
    created, equal_work = [], []
    for number in range(_CREATIONS):
        took = in_turns(
            number,
            lambda: tremplin.create("ours", server=server),
            lambda: lxc("init", image, "theirs"),
        )
        created.append(took)
        # What a host is promised of a creation is more than `lxc init` does.
        init = timed(lambda: lxc("init", image, "new"))
        init += timed(lambda: lxc(*marking))
        init += timed(lambda: lxc("rename", "new", "named"))
        equal_work.append((took[0], init))
        delete()
        lxc("delete", "theirs")
        lxc("delete", "named")
    yield beside("create, image there", created)
    yield beside("create, mark, rename", equal_work)
    rounds: dict[str, list[tuple[float, float]]] = {"start": [], "stop": [], "delete": []}
    for number in range(_ROUNDS):
        tremplin.create("ours", server=server)
        lxc("init", image, "theirs")
        pairs = {
            "start": (
                _call_and_wait(tremplin, "StartContainer", "UpdateStartStatus", "ours"),
                lambda: lxc("start", "theirs"),
            ),
            "stop": (
                _call_and_wait(tremplin, "StopContainer", "UpdateStopStatus", "ours"),
                lambda: lxc("stop", "theirs"),
            ),
            "delete": (delete, lambda: lxc("delete", "theirs")),
        }
        for name, (ours, theirs) in pairs.items():
            rounds[name].append(in_turns(number, ours, theirs))
    for name, pairs_of_it in rounds.items():
        yield beside(name, pairs_of_it)
    tremplin.create("ours", server=server)
    info = [
        timed(lambda: tremplin.call("GetContainerInfo", container_name="ours")) for _ in range(50)
    ]
    lists = [timed(lambda: lxc("list", "--format", "csv")) for _ in range(9)]
    yield ratio("GetContainerInfo, lxc list", statistics.median(info), statistics.median(lists))
    machine.remove_containers()


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
    lxc = Lxc(machine)
    rates: dict[str, list[float]] = {"tremplin": [], "lxc": []}

    def forget() -> None:
        machine.forget_images()
        # tremplin puts the image on the disk afterwards, lxc leaves that to whoever comes next.
        machine.run("sync")

    for _ in range(_DOWNLOADS):
        forget()
        url = server()
        elapsed = timed(lambda url=url: tremplin.create("ours", alias=alias, server=url))  # type: ignore[misc]  # bound now
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
        query = ("query", "--wait", "-X", "POST", "/1.0/instances", "-d", json.dumps(body))
        elapsed = timed(lambda query=query: lxc(*query))  # type: ignore[misc]  # bound now
        rates["lxc"].append(size / elapsed / 1000)
        machine.remove_containers()
    ours, theirs = (statistics.median(rates[name]) for name in ("tremplin", "lxc"))
    return Figure(
        f"create with download: {what}",
        {"tremplin": ours, "lxc": theirs},
        "MB/s",
        "≥ lxc / 1.05",
        ours * AS_FAST >= theirs,
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
        theirs.append(timed(lambda: machine.start_lxd(network=False)))
        ours.append(timed(tremplin.start))
    yield Figure(
        "exec to TremplinReady, LXD up and formatted; beside it LXD's own start",
        {"tremplin": statistics.median(ours), "lxd": statistics.median(theirs)},
        "ms",
    )
