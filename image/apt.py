"""Debian packages from the mirrors that this machine already uses, whatever they are."""

from __future__ import annotations

from pathlib import Path

from image.build import BuildError, run

GUEST_SUITE = "bookworm"
"""The release that the guest and the container are made of."""

DPKG_OPTIONS = (
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bash-completion/*",
)


class Mirrors:
    """Where this machine gets Debian from.

    main: address of the archive; security: address of the security archive, when it has one.
    """

    def __init__(self, main: str, security: str | None) -> None:
        self.main = main
        self.security = security

    @classmethod
    def of_this_machine(cls) -> Mirrors:
        """Asks apt, which reads both formats of source lists. Raises BuildError."""
        rows = run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
             "Created-By: Packages"]
        )  # fmt: skip
        entries = [row.split() for row in rows.splitlines() if row.endswith(" main")]
        codename = _codename()
        main = [uri for uri, release, _ in entries if release in {codename, "stable"}]
        security = [uri for uri, release, _ in entries if release.endswith("-security")]
        if not main:
            raise BuildError(
                f"cannot find a Debian mirror: apt's sources have no entry for {codename} main"
            )
        return cls(main[0], security[0] if security else None)

    def sources(self, suite: str) -> str:
        """A source list, one line per archive, for a suite; a release has a security one."""
        key = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
        signed = f" [signed-by={key}]" if key.exists() else ""
        lines = [f"deb{signed} {self.main} {suite} main"]
        if self.security is not None and suite == GUEST_SUITE:
            lines.append(f"deb{signed} {self.security} {suite}-security main")
        return "\n".join(lines) + "\n"


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise BuildError("cannot tell this machine's Debian release: no VERSION_CODENAME")


class Apt:
    """apt with lists and settings of its own, so that this machine's are left alone.

    folder: where it keeps them.
    """

    def __init__(self, mirrors: Mirrors, suite: str, folder: Path) -> None:
        self._folder = folder
        for name in ("lists/partial", "cache/archives/partial", "parts"):
            (folder / name).mkdir(parents=True)
        (folder / "sources.list").write_text(mirrors.sources(suite))
        (folder / "status").touch()
        self._options = [
            f"-oDir::Etc::SourceList={folder}/sources.list",
            f"-oDir::Etc::SourceParts={folder}/parts",
            f"-oDir::Etc::Preferences={folder}/none",
            f"-oDir::Etc::PreferencesParts={folder}/parts",
            f"-oDir::State={folder}",
            f"-oDir::State::Lists={folder}/lists",
            f"-oDir::State::status={folder}/status",
            f"-oDir::Cache={folder}/cache",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
        ]
        run(["apt-get", *self._options, "--quiet", "--error-on=any", "update"])

    def depends(self, package: str) -> list[str]:
        """The packages that a package depends on directly."""
        rows = run(["apt-cache", *self._options, "depends", "--important", package])
        return [row.split()[-1] for row in rows.splitlines() if "Depends:" in row]

    def unpack(self, package: str, target: Path) -> None:
        """Downloads a package and unpacks its files below target, without installing it."""
        run(["apt-get", *self._options, "--quiet", "download", package], cwd=self._folder)
        downloaded = list(self._folder.glob(f"{package}_*.deb"))
        if len(downloaded) != 1:
            raise BuildError(f"cannot download {package}: apt wrote no such file")
        target.mkdir(parents=True, exist_ok=True)
        run(["dpkg-deb", "--extract", downloaded[0], target])
        downloaded[0].unlink()


def bootstrap(target: Path, packages: list[str], mirrors: Mirrors) -> None:
    """Installs a minimal Debian with these packages into the new folder target.

    Raises BuildError.
    """
    proxy = run(["apt-config", "dump", "--format", "%v%n", "Acquire::http::Proxy"]).strip()
    options = [f"--dpkgopt={option}" for option in DPKG_OPTIONS]
    if proxy:
        options.append(f'--aptopt=Acquire::http::Proxy "{proxy}"')
    command: list[str | Path] = [
        "unshare", "--mount", "--propagation", "private",
        "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", "--quiet",
        '--aptopt=Apt::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"',
        "--aptopt=Acquire::Retries 3",
        # A merged /usr from the start, instead of a perl program that merges it.
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        *options, "--include=" + ",".join(["usr-is-merged", *packages]), GUEST_SUITE, target, "-",
    ]  # fmt: skip
    run(command, stdin=mirrors.sources(GUEST_SUITE), env={"LC_ALL": "C.UTF-8"})
    # They are for this machine's build: its proxy and its speed are not the guest's business.
    (target / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)
    (target / "etc/dpkg/dpkg.cfg.d/99mmdebstrap").unlink(missing_ok=True)
