"""`python3 -m image guest` writes build/image; `python3 -m image containers` writes
build/container-image. Both show their stages and end at once when nothing has changed.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from image import container, guest, initrd, qemu, simplestreams, vsock_device
from image.apt import DPKG_OPTIONS, Apt, Mirrors, bootstrap
from image.build import (
    ROOT,
    BuildError,
    Cache,
    digest,
    give_back,
    locked,
    package_list,
    publish,
    publish_folder,
    recipe,
    say,
    stage,
    tree_digest,
    working_folder,
    write_text,
)
from image.kernel import INITRD_MODULES, LATER_MODULES, PACKAGES, Kernel, index_modules

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent


def main(words: list[str]) -> int:
    """Runs one build; returns the exit status."""
    builds: dict[str, tuple[str, Callable[[Cache], None]]] = {
        "guest": ("the guest image", build_guest),
        "containers": ("the container images", build_containers),
    }
    if len(words) != 1 or words[0] not in builds:
        say(f"usage: python3 -m image {'|'.join(builds)}")
        return 2
    what, build = builds[words[0]]
    began = time.monotonic()
    # depmod, mke2fs and others are there even where a person's PATH does not say so.
    os.environ["PATH"] = (
        os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    )
    try:
        _become_root()
        build(Cache(_cache_folder()))
    except BuildError as error:
        sys.stderr.write(f"cannot build {what}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"building {what} was interrupted\n")
        return 130
    say(f"image: {what} ready after {time.monotonic() - began:.1f} s")
    return 0


def _become_root() -> None:
    # Debian's files have owners, and chroot wants root.
    if os.geteuid() == 0:
        return
    if shutil.which("sudo") is None:
        raise BuildError("it needs root, or sudo, and there is neither")
    kept = [name for name in os.environ if name in {"HOME", "KERNEL"} or name.startswith("PIP_")]
    kept += ["TERMINA_CACHE"] if "TERMINA_CACHE" in os.environ else []
    words = ["sudo", f"--preserve-env={','.join(kept)}", sys.executable, "-B", "-m", "image"]
    os.execvp("sudo", [*words, *sys.argv[1:]])


def _cache_folder() -> Path:
    given = os.environ.get("TERMINA_CACHE")
    return Path(given) if given else Path.home() / ".cache/termina-agent"


def build_guest(cache: Cache) -> None:
    """Writes kernel, initrd, root filesystem, command line, the vsock device and QEMU."""
    flavour = os.environ.get("KERNEL") or "cloud"
    if flavour not in PACKAGES:
        raise BuildError(f"KERNEL is {flavour!r}, not one of {', '.join(PACKAGES)}")
    output = ROOT / "build/image"
    with locked(output / ".lock"):
        sources = tree_digest(ROOT, [*HERE.rglob("*"), *_agent_files()])
        key = digest(sources, flavour, guest.REQUIREMENTS)
        names = ("vmlinux", "initrd.img", "rootfs.img", "cmdline", "vhost-device-vsock")
        marker = output / ".inputs"
        whole = all((output / name).exists() for name in names)
        if whole and marker.exists() and marker.read_text() == key:
            return
        marker.unlink(missing_ok=True)
        layers = _Layers(cache, flavour)
        layers.make_all()
        with working_folder(cache.folder) as work:
            with stage("initrd"):
                initrd.write(
                    work / "initrd.img",
                    now=layers.kernel.in_order(INITRD_MODULES),
                    later=layers.kernel.in_order(LATER_MODULES),
                    work=work,
                )
            with stage("root filesystem"):
                guest.write_rootfs(work / "rootfs.img", work, base=layers.base)
            publish(layers.kernel.folder / "vmlinux", output / "vmlinux")
            publish(layers.vsock_device, output / "vhost-device-vsock")
            publish_folder(layers.qemu, output / "qemu")
            publish(work / "initrd.img", output / "initrd.img")
            publish(work / "rootfs.img", output / "rootfs.img")
            write_text(output / "cmdline", guest.COMMAND_LINE + "\n")
        write_text(marker, key)


def _agent_files() -> list[Path]:
    return [path for path in (ROOT / "agent").rglob("*") if path.suffix not in {".pyc", ".pyi"}]


class _Layers:
    """The slow parts of the guest image, two of them at a time."""

    def __init__(self, cache: Cache, flavour: str) -> None:
        self._cache = cache
        self._flavour = flavour

    def make_all(self) -> None:
        _together(self._fetch, self._debian_layer)
        key = digest(
            self.debian.name, self.wheels.name, self.kernel.folder.name, HERE / "guest.py",
            HERE / "kernel.py", tree_digest(guest.OVERLAY, guest.OVERLAY.rglob("*")),
        )  # fmt: skip
        self.base = self._cache.layer("base", key, self._base)

    def _debian_layer(self) -> None:
        how = recipe(guest.debian_layer, bootstrap, guest.UNUSED, DPKG_OPTIONS)
        key = digest(*package_list(guest.PACKAGES), how)
        self.debian = self._cache.layer("guest", key, _timed("Debian packages", guest.debian_layer))

    def _fetch(self) -> None:
        key = digest(self._flavour, recipe(self._kernel, index_modules, Kernel.write_vmlinux))
        folder = self._cache.layer("kernel", key, _timed("kernel", self._kernel))
        self.kernel = Kernel(folder)
        key = digest(guest.REQUIREMENTS, recipe(guest.wheels_layer))
        self.wheels = self._cache.layer("wheels", key, _timed("wheels", guest.wheels_layer))
        key = digest(recipe(vsock_device.fetch))
        self.vsock_device = self._cache.layer(
            "vsock-device", key, _timed("vhost-device-vsock", vsock_device.fetch)
        )
        self.qemu = self._newer_qemu()

    def _newer_qemu(self) -> Path | None:
        # Nothing depends on it but speed.
        try:
            if not qemu.is_wanted():
                return None
            return self._cache.layer("qemu", digest(HERE / "qemu.py"), _timed("QEMU", qemu.fetch))
        except BuildError as error:
            say(f"image: VMs run with this machine's QEMU: {error}")
            return None

    def _kernel(self, target: Path, work: Path) -> None:
        apt = Apt(Mirrors.of_this_machine(), "bookworm", work / "apt")
        newest = [p for p in apt.depends(PACKAGES[self._flavour]) if p.startswith("linux-image-")]
        if len(newest) != 1:
            raise BuildError(f"cannot tell the newest kernel of {PACKAGES[self._flavour]}")
        apt.unpack(newest[0], target)
        index_modules(target)
        Kernel(target).write_vmlinux(target / "vmlinux")

    def _base(self, target: Path, work: Path) -> None:
        with stage("libraries, modules and compiling"):
            guest.base_layer(
                target, work, debian=self.debian, wheels=self.wheels, kernel=self.kernel
            )


def _timed(name: str, make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def timed(target: Path, work: Path) -> None:
        with stage(name):
            make(target, work)

    return timed


def _together(*jobs: Callable[[], None]) -> None:
    """Runs jobs at the same time; raises the first one's error when all have ended."""
    errors: list[BuildError] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BuildError as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def build_containers(cache: Cache) -> None:
    """Writes the simplestreams tree of the container images."""
    output = ROOT / "build/container-image"
    with locked(ROOT / "build/.container-image.lock"):
        how = recipe(container.packages_layer, bootstrap, container.UNUSED, DPKG_OPTIONS)
        packages = cache.layer(
            "container",
            digest(*package_list(container.PACKAGES), how),
            _timed("Debian packages of the container", container.packages_layer),
        )
        make = functools.partial(container.debian, packages=packages)
        key = digest(packages.name, _files("debian"), HERE / "container.py")
        debian = cache.layer("debian", key, _timed("Debian container", make))
        how = recipe(container.busybox, container.squash)
        key = digest(container.BUSYBOX, _files("busybox"), how)
        busybox = cache.layer("busybox", key, _timed("busybox container", container.busybox))
        key = digest(debian.name, busybox.name, HERE / "simplestreams.py", Path(__file__))
        marker = output / ".inputs"
        if marker.exists() and marker.read_text() == key:
            return
        products = [
            simplestreams.Product(
                os="debian",
                release="bookworm",
                # Hosts in the field ask for debian/bullseye.
                aliases=["debian/bookworm", "debian/bullseye", "debian"],
                rootfs=debian,
            ),
            simplestreams.Product(os="busybox", release="1", aliases=["busybox"], rootfs=busybox),
        ]
        with stage("simplestreams tree"), working_folder(ROOT / "build") as work:
            simplestreams.write_tree(work / "tree", products)
            write_text(work / "tree/.inputs", key)
            if output.exists():
                output.rename(work / "old")
            (work / "tree").rename(output)
            for path in [output, *output.rglob("*")]:
                give_back(path)


def _files(name: str) -> str:
    return tree_digest(container.FILES, (container.FILES / name).rglob("*"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
