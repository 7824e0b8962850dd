"""CreateContainer from an image server that speaks https, with a certificate of its own making."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from agent.pb import tremplin_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lxd.host import Tremplin

_CREATION = pb.ContainerCreationProgress


def _make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-nodes", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return certificate, key


def _refused(tremplin: Tremplin, server: str, reason: str) -> None:
    end = tremplin.create("secret", server=server).message
    assert end.status == _CREATION.FAILED
    assert end.failure_reason.startswith("cannot create container secret: ")
    assert reason in end.failure_reason
    assert "\n" not in end.failure_reason
    assert tremplin.machine.containers() == {}


def test_own_certificate(tremplin: Tremplin, tmp_path: Path) -> None:
    """Refused unless the option names it; another one, and a file that is none, are refused too."""
    machine = tremplin.machine
    machine.forget_images()
    certificate, key = _make_certificate(tmp_path, "ours")
    other, _ = _make_certificate(tmp_path, "other")
    server = machine.serve_images_with_tls(certificate, key)
    _refused(tremplin, server, "certificate signed by unknown authority")
    allowed = tmp_path / "allowed.pem"
    tremplin.restart(image_certificate=str(allowed))
    try:
        _refused(tremplin, server, f"certificate {allowed}: No such file or directory")
        allowed.write_bytes(key.read_bytes())
        _refused(tremplin, server, f"certificate {allowed}: it is not a PEM certificate")
        allowed.write_bytes(other.read_bytes())
        _refused(tremplin, server, "certificate")
        allowed.write_bytes(certificate.read_bytes())
        assert tremplin.create("secret", server=server).message.status == _CREATION.CREATED
        assert tremplin.create("plain").message.status == _CREATION.CREATED
    finally:
        tremplin.restart()
