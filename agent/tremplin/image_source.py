"""Where the image of a container comes from: a simplestreams server, or two files of the VM."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from agent.tremplin.operation import OperationError
from agent.tremplin.paths import open_file, path_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.pb import tremplin_pb2 as pb

_KNOWN_SECONDS = 600.0
"""How long an alias is taken to mean what it meant."""
_KNOWN_IMAGES = 64
"""Aliases that are remembered."""


class FromServer(NamedTuple):
    """An image on a simplestreams server."""

    server: str
    alias: str


class FromFiles(NamedTuple):
    """An image in two files of the VM."""

    rootfs_path: str
    metadata_path: str


class KnownImages:
    """Which images the aliases of servers were found to mean, for some minutes: LXD would look into
    the server's index, of which it keeps a copy for an hour, and find the same.
    """

    def __init__(self) -> None:
        self._found: dict[FromServer, tuple[str, float]] = {}

    def note(self, source: FromServer, fingerprint: str, at: float) -> None:
        """LXD has the image that source meant at that time, in seconds of the caller's clock."""
        self._found.pop(source, None)
        self._found[source] = (fingerprint, at)
        if len(self._found) > _KNOWN_IMAGES:
            del self._found[next(iter(self._found))]

    def fingerprint(self, source: FromServer, now: float) -> str:
        """That of the image that source means, "" when LXD has to find out; now: as in note()."""
        fingerprint, at = self._found.get(source, ("", now))
        return fingerprint if now - at < _KNOWN_SECONDS else ""

    def forget(self, source: FromServer) -> None:
        """LXD has to find out what it means."""
        self._found.pop(source, None)


def image_server(url: str, *, lsb_release: str = "/etc/lsb-release") -> str:
    """The URL of an image server with the image's milestone in the place of %d, if it has one."""
    if "%d" not in url:
        return url
    try:
        with open(lsb_release, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return url
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "CHROMEOS_RELEASE_CHROME_MILESTONE" and value.strip():
            return url.replace("%d", value.strip())
    return url


def image_source(request: pb.CreateContainerRequest) -> FromServer | FromFiles:
    """Where the image of a request comes from."""
    if request.rootfs_path or request.metadata_path:
        return FromFiles(request.rootfs_path, request.metadata_path)
    return FromServer(image_server(request.image_server), request.image_alias)


async def source_problem(source: FromServer | FromFiles) -> str:
    """Why a container cannot be made from that source, or ""."""
    if isinstance(source, FromFiles):
        return await asyncio.to_thread(files_problem, source)
    if not source.server or not source.alias:
        return "it takes image_server and image_alias, or rootfs_path and metadata_path"
    if not source.server.startswith(("http://", "https://")):
        return "the URL of the image server begins with neither http:// nor https://"
    return ""


def files_problem(source: FromFiles) -> str:
    """Why a container cannot be made from these files, or ""; blocks."""
    for field, path in source._asdict().items():
        if problem := path_problem(field, path):
            return problem
        try:
            open_file(path).close()
        except OSError as error:
            return f"cannot read {path}: {error.strerror or error}"
    return ""


def certificate(source: FromServer, path: str | None) -> dict[str, str]:
    """What LXD is told of the certificate that it is to verify an https server against; blocks.

    path: of the file with it, None for LXD's own. Raises OperationError.
    """
    # LXD then trusts this certificate, or what it has signed, and nothing else.
    if path is None or not source.server.startswith("https://"):
        return {}
    try:
        with open(path, encoding="ascii") as file:
            text = file.read()
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not PEM"
        raise OperationError(f"cannot read the image servers' certificate {path}: {why}") from None
    if "-----BEGIN CERTIFICATE-----" not in text:
        raise OperationError(
            f"cannot use the image servers' certificate {path}: it is not a PEM certificate"
        )
    return {"certificate": text}
