"""The image's building blocks: what is written byte by byte, and layers that survive a bad one."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from image import simplestreams
from image.build import BuildError, Cache, locked, package_list, recipe, run, working_folder
from image.initrd import cpio
from image.kernel import copy_module


def test_cpio_is_what_cpio_reads(tmp_path: Path) -> None:
    """A directory, a program and an empty file come back with content and permissions."""
    archive = cpio([("d", 0o040755, b""), ("d/x", 0o100755, b"abc"), ("e", 0o100644, b"")])
    subprocess.run(
        ["cpio", "--extract", "--quiet"], cwd=tmp_path, input=archive, check=True,
        capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "d/x").read_bytes() == b"abc"
    assert (tmp_path / "d/x").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "e").stat().st_size == 0


def test_copied_modules_lose_what_is_not_loaded(tmp_path: Path) -> None:
    """The signature behind the end of the file, and the sections; the rest stays."""
    source = tmp_path / "source.c"
    sections = ("kept", ".BTF", ".orc_unwind", ".orc_unwind_ip")
    source.write_text(
        "".join(
            f'__attribute__((section("{name}"), used)) static const int s{number} = 1;\n'
            for number, name in enumerate(sections)
        )
    )
    module, copy = tmp_path / "signed.ko", tmp_path / "copy.ko"
    run(["gcc", "-c", "-o", module, source])
    with module.open("ab") as file:
        file.write(b"s" * 700 + b"~Module signature appended~\n")
    copy_module(module, copy)
    assert b"signature" not in copy.read_bytes()
    left = run(["readelf", "--wide", "--section-headers", copy])
    assert "kept" in left
    assert not any(name in left for name in sections[1:])


def test_layer_is_made_once_and_only_when_whole(tmp_path: Path) -> None:
    """A build that fails leaves nothing behind; two at once make one layer."""
    cache = Cache(tmp_path / "cache")
    made: list[str] = []

    def fail(target: Path, _work: Path) -> None:
        target.write_text("half")
        raise BuildError("the network is gone")

    def make(target: Path, _work: Path) -> None:
        made.append("made")
        target.write_text("whole")

    with pytest.raises(BuildError, match="the network is gone"):
        cache.layer("x", "0" * 24, fail)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".x.lock"]
    threads = [threading.Thread(target=cache.layer, args=("x", "0" * 24, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["made"]
    assert cache.layer("x", "0" * 24, fail).read_text() == "whole"


def test_left_over_folder_is_swept_and_one_in_use_is_not(tmp_path: Path) -> None:
    """What a killed build left goes with the next one, what another build works in stays."""
    old = tmp_path / ".work-old"
    old.mkdir()
    (old / "file").touch()
    run(["touch", "--date=2 hours ago", old])
    with working_folder(tmp_path) as first:
        run(["touch", "--date=2 hours ago", first])
        with working_folder(tmp_path):
            assert not old.exists()
            assert first.exists()
    assert not first.exists()


def test_failed_command_is_told_with_its_last_words(tmp_path: Path) -> None:
    """The error names the command, its status and what it said; a missing one is no traceback."""
    with pytest.raises(BuildError, match="sh ended with 3: no space"):
        run(["sh", "-c", "echo no space >&2; exit 3"])
    with pytest.raises(BuildError, match="cannot run /none/such: there is no such program"):
        run(["/none/such"])
    with locked(tmp_path / "lock"):
        pass


def test_recipe_changes_with_function_and_value() -> None:
    """A layer's key follows the text of the functions that make it and the values they use."""
    assert "def package_list" in recipe(package_list)
    assert recipe(package_list, ("a",)) != recipe(package_list, ("b",))


def test_simplestreams_tree_is_consistent(tmp_path: Path) -> None:
    """Sizes, sums and aliases are those of the files; versions begin with a date, as LXD asks."""
    rootfs = tmp_path / "rootfs"
    rootfs.write_bytes(b"hsqs" + bytes(4) + (1700000000).to_bytes(4, "little") + bytes(5000))
    product = simplestreams.Product(
        os="debian", release="bookworm", aliases=["debian/bookworm", "debian"], rootfs=rootfs
    )
    tree = tmp_path / "tree"
    simplestreams.write_tree(tree, [product])
    index = json.loads((tree / "streams/v1/index.json").read_text())
    images = json.loads((tree / index["index"]["images"]["path"]).read_text())
    (name,) = index["index"]["images"]["products"]
    shown = images["products"][name]
    assert shown["aliases"].split(",") == ["debian/bookworm", "debian"]
    ((version, content),) = shown["versions"].items()
    assert version == "20231114_221320"
    whole = b""
    for kind in ("lxd.tar.xz", "root.squashfs"):
        item = content["items"][kind]
        data = (tree / item["path"]).read_bytes()
        assert (item["size"], item["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        whole += data
    metadata = content["items"]["lxd.tar.xz"]
    assert metadata["combined_squashfs_sha256"] == hashlib.sha256(whole).hexdigest()
    packed = lzma.decompress((tree / metadata["path"]).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.extractfile("metadata.yaml")
        assert member is not None
        assert json.load(member)["architecture"] == "x86_64"


def test_package_lists_are_read_without_comments(tmp_path: Path) -> None:
    """One package per line; comments and blank lines are none."""
    path = tmp_path / "list"
    path.write_text("# head\nlxd\n\nlxcfs # why\n")
    assert package_list(path) == ["lxd", "lxcfs"]
