"""A simplestreams tree of LXD images, as LXD's `simplestreams` protocol reads it over http.

Only files: serving them is the host's business.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import tarfile
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Product:
    """One image and how a host asks for it.

    os, release: what it is; aliases: what CreateContainer's image_alias may say; rootfs: the
    squashfs, whose own time becomes the version that LXD compares.
    """

    def __init__(self, *, os: str, release: str, aliases: Sequence[str], rootfs: Path) -> None:
        self.os = os
        self.release = release
        self.aliases = list(aliases)
        self.rootfs = rootfs
        self.created = _creation_time(rootfs)

    @property
    def name(self) -> str:
        """The product's key in the index."""
        return f"{self.os}:{self.release}:amd64:default"

    def metadata(self) -> bytes:
        """lxd.tar.xz: metadata.yaml alone, of which JSON is a subset."""
        content = json.dumps(
            {
                "architecture": "x86_64",
                "creation_date": self.created,
                "properties": {
                    "architecture": "amd64",
                    "description": f"{self.os} {self.release} (termina-agent)",
                    "os": self.os,
                    "release": self.release,
                    "variant": "default",
                },
                "templates": {},
            },
            indent=2,
        ).encode()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            member = tarfile.TarInfo("metadata.yaml")
            member.size, member.mtime = len(content), self.created
            archive.addfile(member, io.BytesIO(content))
        return lzma.compress(packed.getvalue())


def _creation_time(squashfs: Path) -> int:
    # Its superblock holds the time at offset 8 (Documentation/filesystems/squashfs.rst), which
    # stays when the file is copied.
    with squashfs.open("rb") as file:
        return int.from_bytes(file.read(12)[8:], "little")


def write_tree(tree: Path, products: Sequence[Product]) -> None:
    """Writes streams/v1/index.json, streams/v1/images.json and the images into the new folder.

    tree: what an image server serves as its root.
    """
    images = {product.name: _add(tree, product) for product in products}
    streams = tree / "streams/v1"
    streams.mkdir(parents=True)
    index = {
        "format": "index:1.0",
        "index": {
            "images": {
                "datatype": "image-downloads",
                "format": "products:1.0",
                "path": "streams/v1/images.json",
                "products": sorted(images),
            }
        },
    }
    catalogue = {
        "content_id": "images",
        "datatype": "image-downloads",
        "format": "products:1.0",
        "products": images,
    }
    (streams / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    (streams / "images.json").write_text(json.dumps(catalogue, indent=1) + "\n")


def _add(tree: Path, product: Product) -> dict[str, object]:
    # LXD passes over a version that does not begin with a date.
    version = time.strftime("%Y%m%d_%H%M%S", time.gmtime(product.created))
    folder = f"images/{product.os}/{product.release}/amd64/default/{version}"
    (tree / folder).mkdir(parents=True)
    metadata = product.metadata()
    (tree / folder / "lxd.tar.xz").write_bytes(metadata)
    place = tree / folder / "rootfs.squashfs"
    shutil.copyfile(product.rootfs, place)
    rootfs_sum, combined = hashlib.sha256(), hashlib.sha256(metadata)
    with place.open("rb") as file:
        while block := file.read(1 << 20):
            rootfs_sum.update(block)
            combined.update(block)
    items = {
        "lxd.tar.xz": {
            "ftype": "lxd.tar.xz",
            "path": f"{folder}/lxd.tar.xz",
            "sha256": hashlib.sha256(metadata).hexdigest(),
            "size": len(metadata),
            "combined_squashfs_sha256": combined.hexdigest(),
        },
        "root.squashfs": {
            "ftype": "squashfs",
            "path": f"{folder}/rootfs.squashfs",
            "sha256": rootfs_sum.hexdigest(),
            "size": place.stat().st_size,
        },
    }
    return {
        "aliases": ",".join(product.aliases),
        "arch": "amd64",
        "os": product.os,
        "release": product.release,
        "release_title": product.release,
        "variant": "default",
        "versions": {version: {"items": items}},
    }
