"""The few things every step of a build needs: commands, visible stages, a cache of slow layers
that survives interruption and two builds at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""


class BuildError(Exception):
    """A build that cannot go on; str() is what a person reads."""


def run(
    command: Sequence[str | Path],
    *,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Runs a command to its end.

    stdin: its whole input; env: added to ours.
    Returns its standard output. Raises BuildError with the last lines it said when it fails.
    """
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        raise BuildError(f"cannot run {words[0]}: there is no such program")
    try:
        result = subprocess.run(
            # Whatever ends the build ends what it started too.
            ["setpriv", "--pdeathsig", "KILL", *words],
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            cwd=cwd,
            check=False,
        )
    except OSError as error:
        raise BuildError(f"cannot run {words[0]}: {error.strerror}") from None
    if result.returncode != 0:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise BuildError(
            f"{words[0]} ended with {result.returncode}: " + "\n  ".join(["", *said[-12:]]).strip()
        )
    return result.stdout


def say(text: str) -> None:
    """One line of progress for the person who waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Shows a stage of the build with the seconds it took."""
    began = time.monotonic()
    yield
    say(f"image: {name:<44} {time.monotonic() - began:6.1f} s")


def digest(*parts: str | bytes | Path) -> str:
    """A short key of inputs: of text, bytes and the content of files, in this order."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            content = part.read_bytes()
        else:
            content = part.encode() if isinstance(part, str) else part
        whole.update(b"%d:" % len(content) + content)
    return whole.hexdigest()[:24]


def recipe(*things: object) -> str:
    """What a layer's key needs to know of how it is made: functions' text, other values as such."""
    return "\n".join(
        inspect.getsource(thing) if inspect.isroutine(thing) or inspect.isclass(thing)
        else repr(thing)
        for thing in things
    )  # fmt: skip


def tree_digest(top: Path, names: Iterable[Path]) -> str:
    """A key of the files' content, names and permissions; the names are shown relative to top."""
    parts: list[str | bytes | Path] = []
    for path in sorted(names):
        if path.is_symlink():
            parts += [str(path.relative_to(top)), os.fsencode(path.readlink())]
        elif path.is_file():
            parts += [str(path.relative_to(top)), oct(path.stat().st_mode & 0o111), path]
    return digest(*parts)


def package_list(path: Path) -> list[str]:
    """The Debian packages named in a list, one per line, # for comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that other builds, in this checkout or another, wait for."""
    make_folder(path.parent)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Cache:
    """A folder of slow layers outside the checkout, one file or folder for each key.

    A layer is made aside and renamed when it is whole, so that one that is there can be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layer(self, name: str, key: str, make: Callable[[Path, Path], None]) -> Path:
        """The layer of that name and key, made now when it is not there.

        make: called with a new path to write the layer to and an empty folder to work in.
        Layers of the same name and another key that nobody has used for a month go away.
        """
        target = self.folder / f"{name}-{key}"
        if not target.exists():
            with locked(self.folder / f".{name}.lock"):
                if not target.exists():
                    self._make(target, make)
                    self._forget_old(name, target)
        os.utime(target)
        return target

    def _make(self, target: Path, make: Callable[[Path, Path], None]) -> None:
        with working_folder(self.folder) as work:
            scratch = work / "work"
            scratch.mkdir()
            make(work / "layer", scratch)
            (work / "layer").rename(target)

    def _forget_old(self, name: str, kept: Path) -> None:
        for other in self.folder.glob(f"{name}-" + "[0-9a-f]" * 24):
            if other != kept and time.time() - other.stat().st_mtime > 30 * 24 * 3600:
                remove(other)


def remove(path: Path) -> None:
    """Removes a file or a tree, but nothing below a mount point."""
    if path.is_dir() and not path.is_symlink():
        run(["rm", "-rf", "--one-file-system", path])
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """An empty folder below parent that goes away; what a killed build left there does too.

    Each is locked while it is in use, so that a folder without a holder is a left-over.
    """
    make_folder(parent)
    for old in parent.glob(".work-*"):
        _sweep(old)
    folder = Path(tempfile.mkdtemp(prefix=".work-", dir=parent))
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        folder.chmod(0o755)
        yield folder
    finally:
        remove(folder)
        os.close(handle)


def _sweep(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(handle).st_mtime > 60:
            remove(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


def publish(source: Path, target: Path) -> None:
    """Copies a file to its final place at once, sparse, owned by whoever called sudo."""
    make_folder(target.parent)
    aside = target.with_name(f".{target.name}.new")
    run(["cp", "--sparse=always", "--reflink=auto", source, aside])
    give_back(aside)
    aside.replace(target)


def publish_folder(source: Path | None, target: Path) -> None:
    """Copies a folder of files to its final place, or removes what is there when there is none."""
    aside = target.with_name(f".{target.name}.new")
    remove(aside)
    if source is not None:
        run(["cp", "-a", "--reflink=auto", source, aside])
        for path in [aside, *aside.iterdir()]:
            give_back(path)
    remove(target)
    if source is not None:
        aside.rename(target)


def give_back(path: Path) -> None:
    """Gives a file to the user who called sudo, if it was sudo."""
    if os.environ.get("SUDO_UID", "").isdigit() and os.geteuid() == 0:
        os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1")))


def make_folder(path: Path) -> None:
    """Makes a folder, and those it is in, owned by whoever called sudo; ~/.cache may be one."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        give_back(path)


def write_text(target: Path, text: str) -> None:
    """Writes a small file at once, owned by whoever called sudo."""
    make_folder(target.parent)
    aside = target.with_name(f".{target.name}.new")
    aside.write_text(text)
    give_back(aside)
    aside.replace(target)


def lay_over(files: Path, root: Path) -> None:
    """Copies a tree of ours over root: owned by root, executable where it is here."""
    for path in sorted(files.rglob("*")):
        place = root / path.relative_to(files)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.unlink(missing_ok=True)
            shutil.copyfile(path, place)
            place.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def pack(folder: Path, target: Path) -> None:
    """Archives a folder's content with owners and permissions."""
    run(
        ["tar", "--create", "--file", target, "--directory", folder, "--numeric-owner", "--xattrs",
         "--xattrs-include=*", "--sort=name", "--use-compress-program=zstd -1 -T0", "."]
    )  # fmt: skip


def extract(archive: Path, folder: Path) -> None:
    """Extracts what pack() wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    run(
        ["tar", "--extract", "--file", archive, "--directory", folder, "--numeric-owner",
         "--xattrs", "--xattrs-include=*", "--same-permissions", "--use-compress-program=zstd"]
    )  # fmt: skip
