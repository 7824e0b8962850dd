"""The VM's root filesystem: a Debian layer and a layer of wheels, both cached, and the agent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from image.apt import Mirrors, bootstrap
from image.build import ROOT, BuildError, extract, lay_over, pack, package_list, remove, run
from image.kernel import Kernel

PACKAGES = Path(__file__).with_name("packages-guest.txt")
OVERLAY = Path(__file__).with_name("rootfs")
REQUIREMENTS = ROOT / "requirements/guest.txt"

LIBRARIES = "usr/local/lib/python3.11/dist-packages"
"""Where Debian's Python 3.11 looks for modules that are not Debian's."""

COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off noautogroup apparmor=0 "
    "audit=0 tsc=reliable clocksource=tsc no_timer_check cryptomgr.notests random.trust_cpu=on"
)
"""What made a difference to the time an emulated guest takes to boot; noautogroup because each
process has a session of its own, and nice(2) would count for nothing between them; oops=panic
because a kernel that goes on after a fault may do so with a lock that everybody waits for then."""

UNUSED = (
    "boot", "media", "srv", "var/cache/apt", "var/lib/apt/lists", "var/cache/debconf",
    "var/log/apt", "var/log/*.log", "usr/share/doc", "usr/share/man", "usr/share/info",
    "usr/share/locale", "usr/share/lintian", "usr/share/bash-completion",
    "usr/share/common-licenses",
    "usr/share/perl", "usr/share/perl5", "usr/lib/x86_64-linux-gnu/perl", "usr/lib/systemd/system",
    "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/udev/hwdb.d", "usr/include",
    "usr/lib/python3.11/test", "usr/lib/python3.11/idlelib", "usr/lib/python3.11/lib2to3",
    "usr/lib/python3.11/ensurepip", "usr/lib/python3.11/tkinter", "usr/lib/python3.11/pydoc_data",
)  # fmt: skip
_SETTLED = (
    # Looked for at every start of Python, every lease, every login.
    "usr/lib/python3.11/sitecustomize.py", "etc/dhcp/dhclient-enter-hooks.d/debug",
    "etc/dhcp/dhclient-exit-hooks.d/debug", "etc/*-",
)  # fmt: skip
_DIRECTORIES = (
    "mnt/shared", "mnt/stateful", "opt/google/cros-containers", "etc/maitred", "var/lib/lxcfs",
    "dev", "proc", "sys", "run", "tmp", "home", "root",
)  # fmt: skip


def debian_layer(target: Path, work: Path) -> None:
    """Writes the Debian packages' files as an archive. Raises BuildError."""
    root = work / "root"
    bootstrap(root, package_list(PACKAGES), Mirrors.of_this_machine())
    for pattern in UNUSED:
        for path in root.glob(pattern):
            remove(path)
    pack(root, target)


def wheels_layer(target: Path, work: Path) -> None:
    """Writes the libraries of requirements/guest.txt as an archive. Raises BuildError."""
    folder = work / "wheels"
    pip = ROOT / ".venv/bin/pip"
    if not pip.exists():
        raise BuildError("cannot install the guest's libraries: run `make venv` first")
    run(
        [pip, "install", "--quiet", "--disable-pip-version-check", "--no-compile",
         "--target", folder, "--only-binary=:all:", "--implementation=cp",
         "--python-version=3.11", "--abi=cp311", "--abi=abi3", "--abi=none",
         "--platform=manylinux_2_17_x86_64", "--platform=manylinux2014_x86_64",
         "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_34_x86_64",
         "-r", REQUIREMENTS]
    )  # fmt: skip
    remove(folder / "bin")
    pack(folder, target)


def base_layer(target: Path, work: Path, *, debian: Path, wheels: Path, kernel: Kernel) -> None:
    """Writes everything of the root filesystem but the agent, compiled, as an archive."""
    root = work / "root"
    extract(debian, root)
    extract(wheels, root / LIBRARIES)
    kernel.copy_modules(root)
    _settle(root)
    _compile(root, "usr/lib/python3", "usr/lib/python3.11", LIBRARIES)
    pack(root, target)


def _settle(root: Path) -> None:
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    lay_over(OVERLAY, root)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").symlink_to("/run/resolv.conf")
    for pattern in _SETTLED:
        for path in root.glob(pattern):
            path.unlink()


def _compile(root: Path, *folders: str) -> None:
    # The root is read-only when it runs: what is not compiled now would be compiled at each start.
    # The guest's own interpreter does it; unchecked, because nothing can change afterwards.
    run(
        ["chroot", root, "/usr/bin/python3", "-IS", "-m", "compileall", "-q", "-f", "-j", "2",
         "--invalidation-mode", "unchecked-hash", *(f"/{folder}" for folder in folders)],
        env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


def write_rootfs(target: Path, work: Path, *, base: Path) -> None:
    """Writes the ext4 image of the base layer and the agent. Raises BuildError."""
    root = work / "root"
    extract(base, root)
    agent = root / LIBRARIES / "agent"
    shutil.copytree(
        ROOT / "agent", agent, ignore=shutil.ignore_patterns("__pycache__", "*.pyi", "*.pyc")
    )
    if not (agent / "pb/vm_guest_pb2.py").exists():
        raise BuildError("agent/pb is not there: run `make venv` first")
    _compile(root, f"{LIBRARIES}/agent")
    run(["chmod", "-R", "u=rwX,go=rX", agent])
    run(["chown", "-R", "0:0", agent])
    init = root / "usr/sbin/init"
    init.unlink(missing_ok=True)
    source = ROOT / "agent/process_supervisor/init"
    if not source.exists():
        raise BuildError(f"cannot find {source.relative_to(ROOT)}, the program of PID 1")
    shutil.copyfile(source, init)
    init.chmod(0o755)
    shutil.copy(ROOT / "agent/process_supervisor/termina-ctl", root / "usr/bin")
    os.utime(root, (0, 0))
    make_ext4(root, target)


def make_ext4(root: Path, target: Path) -> None:
    """Writes a folder as an ext4 filesystem without journal: it is never written to."""
    used = int(run(["du", "--summarize", "--block-size=1M", root]).split()[0])
    run(["truncate", f"--size={used + used // 8 + 32}M", target])
    run(
        ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0", "-L",
         "termina", "-d", root, target]
    )  # fmt: skip
