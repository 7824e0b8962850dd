"""The small machine of namespace.sh for the tests: LXD, an image server and tremplin in it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pylxd

from image import container, simplestreams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
_PORT = 8000
_TLS_PORT = 8443
_OTHER_PORT = 8001
_SECONDS = 60.0


def wait_until(condition: Callable[[], Any], what: str, *, seconds: float = _SECONDS) -> Any:
    """The first true result of condition; for what no event can be waited for."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(0.02)


class Gate:
    """Holds up the start of a container where LXD has done all but to run it."""

    def __init__(self, machine: Machine) -> None:
        self._directory = Path(machine.run("mktemp", "-d", "/run/gate-XXXXXX").strip())
        self._outside = Path(f"/proc/{machine.init_pid}/root{self._directory}")
        self.script = self._directory / "hook"
        hook = self._outside / "hook"
        # LXD takes commands for liblxc's hooks as they are: one script, no arguments.
        hook.write_text(
            f"#!/bin/sh\ncd {self._directory}\n>reached\n"
            "while [ ! -e opened ]; do sleep 0.05; done\n"
        )
        hook.chmod(0o755)

    def reached(self) -> bool:
        """Whether the start has come as far as the gate."""
        return (self._outside / "reached").exists()

    def open(self) -> None:
        """Lets the container start, now and in future."""
        (self._outside / "opened").touch()


@contextlib.contextmanager
def new_machine() -> Iterator[Machine]:
    """A machine with a directory of its own, on a disk."""
    directory = Path(tempfile.mkdtemp(prefix="lxd-", dir="/var/tmp"))
    # The root user of an unprivileged container has to get through.
    directory.chmod(0o711)
    try:
        with Machine(directory) as machine:
            yield machine
    finally:
        shutil.rmtree(directory)


class Machine:
    """Namespaces with a data disk, torn down with everything in them by close()."""

    def __init__(self, directory: Path) -> None:
        """directory: on a disk, not too deep: paths of unix sockets are short."""
        self.directory = directory
        self.lxd_dir = directory / "stateful/lxd"
        self.behaviour_file = directory / "behaviour.json"
        self._servers = itertools.count()
        self._children: list[subprocess.Popen[str]] = []
        self._init = subprocess.Popen(
            [HERE / "namespace.sh", directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._init.stdout is not None
        while (line := self._init.stdout.readline()) != "ready\n":
            assert line, "the namespaces did not come up"
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text()
        self.init_pid = int(children)
        self._lxd: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process in the namespaces and removes their cgroups."""
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        self._init.stdin.close()
        self._init.wait(_SECONDS)
        self._init.stdout.close()
        for child in self._children:
            child.wait(_SECONDS)
        for line in (self.directory / "cgroup").read_text().splitlines():
            for folder, _, _ in os.walk(line, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def _inside(self, command: Sequence[str | Path]) -> list[str]:
        enter = ["nsenter", "-t", str(self.init_pid), "-m", "-n", "-p", "-C"]
        lxd = ["env", f"LXD_DIR={self.lxd_dir}", f"LXD_CONF={self.directory}/stateful/lxd_conf"]
        # Entering another mount namespace would otherwise lead to its root directory.
        return [*enter, f"--wdns={ROOT}", "--", *lxd, *map(str, command)]

    def run(self, *command: str | Path, check: bool = True, seconds: float = _SECONDS) -> str:
        """What a command prints that is run inside."""
        result = subprocess.run(
            self._inside(command),
            capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def spawn(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """A process inside; close() ends it. The pid is that of nsenter, see inner_pid()."""
        child = subprocess.Popen(
            self._inside(command), text=True, stdin=subprocess.DEVNULL, cwd=ROOT, **options
        )
        self._children.append(child)
        return child

    @staticmethod
    def inner_pid(child: subprocess.Popen[str]) -> int:
        """The pid, on the machine outside, of a process that was spawned inside."""
        path = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        return int(wait_until(path.read_text, "the child of nsenter"))

    def kill(self, child: subprocess.Popen[str], number: signal.Signals) -> None:
        """Sends a signal to a process that was spawned inside, and returns when it has ended."""
        os.kill(self.inner_pid(child), number)
        child.send_signal(signal.SIGCONT)  # see lxd_held()
        child.wait(_SECONDS)

    def start_lxd(self, *, network: bool = True) -> None:
        """Starts LXD and returns when it answers, with network when its bridge is there too.

        After one that was killed it once was not, and LXD tries again after a minute only.
        """
        self.run("mkdir", "-p", self.lxd_dir)
        with (self.directory / "lxd.log").open("a") as log:
            self._lxd = self.spawn(
                "lxd",
                "--group",
                "lxd",
                "--logfile",
                self.lxd_dir / "lxd.log",
                stdout=log,
                stderr=log,
            )
        self.run("lxd", "waitready", "--timeout", "30")
        query = ("lxc", "query", "/1.0/networks/lxdbr0")
        if network:
            wait_until(
                lambda: '"Unavailable"' not in self.run(*query, check=False),
                "the bridge",
                seconds=150,
            )

    def lxd_runs(self) -> bool:
        """Whether it has not ended."""
        return self._lxd is not None and self._lxd.poll() is None

    def kill_lxd(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends LXD; containers go on."""
        assert self._lxd is not None
        self.kill(self._lxd, number)

    @contextlib.contextmanager
    def lxd_held(self) -> Iterator[None]:
        """LXD stands still; it may be killed meanwhile."""
        assert self._lxd is not None
        entered = self._lxd
        os.kill(self.inner_pid(entered), signal.SIGSTOP)
        try:
            # nsenter(1) does as its child does, and would stay like that.
            state = Path(f"/proc/{entered.pid}/stat")
            wait_until(lambda: state.read_text().split()[2] == "T", "the halt of nsenter")
            yield
        finally:
            entered.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def gate(self, container: str) -> Iterator[Gate]:
        """The next start of a container, which is stopped, goes on when the gate is opened."""
        gate = Gate(self)
        self.run("lxc", "config", "set", container, f"raw.lxc=lxc.hook.pre-start = {gate.script}")
        try:
            yield gate
        finally:
            gate.open()

    @contextlib.contextmanager
    def full_disk(self, *, left: int = 0) -> Iterator[None]:
        """The data disk has only so many bytes left, about."""
        ballast = self.directory / "stateful/ballast"
        free = int(self.run("stat", "-f", "-c", "%a", self.lxd_dir)) * 4096
        try:
            self.run("fallocate", "-l", str(free - max(left, 5 * 1024 * 1024)), ballast)
            if not left:
                self.run("dd", "if=/dev/zero", f"of={ballast}.more", "bs=64K", check=False)
                self.run("sync", check=False)
            yield
        finally:
            self.run("rm", "-f", ballast, f"{ballast}.more")

    @property
    def lxd_socket(self) -> str:
        """LXD's socket, from outside."""
        return f"/proc/{self.init_pid}/root{self.lxd_dir}/unix.socket"

    @property
    def api(self) -> Any:
        """Pylxd's view of LXD's /1.0, from outside."""
        return pylxd.Client(endpoint=self.lxd_socket).api

    def containers(self) -> dict[str, str]:
        """Name and status of every container."""
        found = self.api.instances.get(params={"recursion": "1"}).json()["metadata"]
        return {one["name"]: one["status"] for one in found}

    def remove_containers(self) -> None:
        """Removes every container, when LXD has finished what it has in hand with it."""

        def all_gone() -> bool:
            for name in self.containers():
                self.run("lxc", "delete", "--force", name, check=False)
            return not self.containers()

        wait_until(all_gone, "the end of the last container")

    def images(self) -> list[str]:
        """The fingerprints of LXD's images."""
        return [path.rsplit("/", 1)[1] for path in self.api.images.get().json()["metadata"]]

    def is_on_disk(self, fingerprint: str) -> bool:
        """Whether tremplin has marked an image as flushed."""
        image = self.api.images[fingerprint].get().json()["metadata"]
        return bool(image["properties"].get("tremplin-on-disk") == "true")

    def forget_images(self) -> None:
        """Makes LXD download its images again."""
        for fingerprint in self.images():
            self.run("lxc", "image", "delete", fingerprint)

    def serve_images(self) -> None:
        """Makes the images of the tests and serves them inside.

        `busybox` is one static program, `big` the same with 8 MiB that cannot be compressed.
        """
        tree = self.directory / "images"
        small, big = self.directory / "small", self.directory / "big"
        for folder in (small, big):
            folder.mkdir()
        container.busybox(small / "rootfs.squashfs", small)
        (small / "root/padding").write_bytes(os.urandom(8 * 1024 * 1024))
        container.squash(small / "root", big / "rootfs.squashfs")
        simplestreams.write_tree(
            tree,
            [
                simplestreams.Product(
                    os=name, release="1", aliases=[name, f"{name}/1"],
                    rootfs=folder / "rootfs.squashfs",
                )
                for name, folder in (("busybox", small), ("big", big))
            ],
        )  # fmt: skip
        self.behave()
        self._start_server(tree, _PORT)

    def serve_images_with_tls(self, certificate: Path, key: Path) -> str:
        """The URL of one more server of the same images, which has this certificate, PEM."""
        self._start_server(self.directory / "images", _TLS_PORT, certificate, key)
        return f"https://127.0.0.1:{_TLS_PORT}/{next(self._servers)}"

    def serve_tree(self, tree: Path) -> int:
        """The port of one more server, of somebody else's images."""
        self._start_server(tree, _OTHER_PORT)
        return _OTHER_PORT

    def _start_server(self, tree: Path, port: int, *tls: Path) -> None:
        server = self.spawn(
            sys.executable,
            HERE / "image_server.py",
            tree,
            str(port),
            self.behaviour_file,
            *tls,
            stdout=subprocess.PIPE,
        )
        assert server.stdout is not None
        with server.stdout:
            assert server.stdout.readline() == "ready\n"

    def behave(self, **behaviour: Any) -> None:
        """How the image server behaves from now on."""
        temporary = self.behaviour_file.with_suffix(".new")
        temporary.write_text(json.dumps(behaviour))
        temporary.replace(self.behaviour_file)

    def new_server(self, port: int = _PORT) -> str:
        """A URL of the image server, or of that at another port, that LXD has not seen yet."""
        return f"http://127.0.0.1:{port}/{next(self._servers)}"

    def image_files(self, name: str) -> tuple[str, str]:
        """The paths of an image's root filesystem and metadata."""
        (rootfs,) = (self.directory / "images").rglob(f"{name}/**/rootfs.squashfs")
        return str(rootfs), str(rootfs.with_name("lxd.tar.xz"))

    @contextlib.contextmanager
    def slow_down(self, rate: float) -> Iterator[None]:
        """Images come at so many bytes per second."""
        self.behave(rate=rate)
        try:
            yield
        finally:
            self.behave()
