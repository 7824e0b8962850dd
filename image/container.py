"""The containers' root filesystems: a Debian with systemd and a busybox that starts in no time."""

from __future__ import annotations

import shutil
from pathlib import Path

from image.apt import Mirrors, bootstrap
from image.build import BuildError, extract, lay_over, pack, package_list, remove, run

PACKAGES = Path(__file__).with_name("packages-container.txt")
FILES = Path(__file__).with_name("containers")
"""What is laid over each, by name."""

BUSYBOX = Path("/bin/busybox")

UNUSED = (
    "boot/*", "var/cache/apt/*", "var/lib/apt/lists/*", "var/cache/debconf/*-old", "var/log/apt",
    "var/log/*.log", "usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale",
    "usr/share/lintian", "usr/share/bash-completion", "usr/share/i18n",
    "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/udev/hwdb.d", "usr/lib/systemd/catalog",
    "usr/lib/modprobe.d", "etc/machine-id", "var/lib/dbus/machine-id",
)  # fmt: skip

_SETTLED = (
    # Without it the journal stays in memory, which spares the VM's disk and the start.
    "var/log/journal",
    # Looked for at every lease.
    "etc/dhcp/dhclient-exit-hooks.d/debug", "etc/dhcp/dhclient-enter-hooks.d/debug",
    "etc/dhcp/dhclient-exit-hooks.d/timesyncd",
)  # fmt: skip

MASKED = (
    # No terminals are attached: people come by `lxc exec`.
    "getty.target", "console-getty.service", "systemd-logind.service",
    # Kernel and devices are the VM's.
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-config.mount",
    "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount",
    "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service", "systemd-modules-load.service",
    "systemd-sysctl.service", "systemd-udev-trigger.service", "systemd-udevd.service",
    "systemd-random-seed.service", "systemd-remount-fs.service", "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service", "modprobe@.service", "kmod-static-nodes.service",
    "systemd-fsck-root.service", "systemd-pstore.service", "ifupdown-pre.service",
    # Done when the image was built, or of no use in a container that was made a moment ago.
    "systemd-firstboot.service", "systemd-sysusers.service",
    "systemd-journal-catalog-update.service",
    "systemd-hwdb-update.service", "systemd-machine-id-commit.service", "ldconfig.service",
    "systemd-journal-flush.service", "systemd-tmpfiles-setup-dev.service",
    "systemd-update-done.service", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "systemd-boot-update.service",
    # Work in the background that a person can do by hand.
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "e2scrub_reap.service", "fstrim.timer", "systemd-tmpfiles-clean.timer", "motd-news.timer",
)  # fmt: skip


def packages_layer(target: Path, work: Path) -> None:
    """Writes the Debian packages' files as an archive. Raises BuildError."""
    root = work / "root"
    bootstrap(root, package_list(PACKAGES), Mirrors.of_this_machine())
    for pattern in UNUSED:
        for path in root.glob(pattern):
            remove(path)
    pack(root, target)


def debian(target: Path, work: Path, *, packages: Path) -> None:
    """Writes the squashfs of a Debian container that systemd runs. Raises BuildError.

    packages: what packages_layer() wrote.
    """
    root = work / "root"
    extract(packages, root)
    for pattern in _SETTLED:
        for path in root.glob(pattern):
            remove(path)
    lay_over(FILES / "debian", root)
    (root / "etc/sudoers.d/termina").chmod(0o440)
    # Empty, not missing: each container gets its own, and it is no "first boot" with its presets.
    (root / "etc/machine-id").touch()
    (root / "etc/hostname").write_text("debian\n")
    (root / "etc/resolv.conf").write_text("")
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    squash(root, target)


def busybox(target: Path, work: Path) -> None:
    """Writes the squashfs of a container that is one static program. Raises BuildError."""
    root = work / "root"
    for name in ("bin", "sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "run", "tmp", "root",
                 "home", "mnt", "opt", "var/lib/systemd/linger", "etc"):  # fmt: skip
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "root").chmod(0o700)
    if not BUSYBOX.exists():
        raise BuildError("cannot find /bin/busybox of the package busybox-static")
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in run([BUSYBOX, "--list-full"]).split():
        place = root / applet
        if not place.exists() and place.name != "init":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to("/bin/busybox")
    lay_over(FILES / "busybox", root)
    for name in ("shadow", "gshadow"):
        (root / "etc" / name).chmod(0o640)
    # su and login look an account up as root.
    (root / "bin/busybox").chmod(0o4755)
    squash(root, target)


def squash(root: Path, target: Path) -> None:
    """Writes a folder as one squashfs of zstd, which is the quickest for LXD to unpack."""
    run(
        ["mksquashfs", root, target, "-comp", "zstd", "-Xcompression-level", "12", "-noappend",
         "-quiet", "-no-progress", "-no-exports"]
    )  # fmt: skip
