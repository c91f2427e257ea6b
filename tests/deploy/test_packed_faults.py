"""Packed bundles whose archive lies: about names, order, sizes, kinds of members or its own format."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.deploy.tiny import ENGINE, TEN_GB, member, refuses, repack, reseal, tiny_bundle
from vmkd_fx.deploy.manifest import LARGEST_MANIFEST
from vmkd_fx.deploy.seal import unseal


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle.vmkd")


def contents(packed: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(packed) as archive:
        return [(item.name, archive.extractfile(item).read()) for item in archive]  # type: ignore[union-attr]


def test_what_is_packed_by_hand_is_read(packed: Path) -> None:
    """So that the refusals below are not for another reason."""
    whole = packed.read_bytes()
    repack(packed, *contents(packed))
    assert packed.read_bytes() == whole


def test_packed_names_and_orders_other_than_the_manifest_s(packed: Path) -> None:
    manifest, graph, engine = contents(packed)
    for members in (
        (manifest, engine, graph),
        (manifest, graph, graph, engine),
        (manifest, graph, ("../evil", engine[1])),
        (manifest, graph, ("/etc/evil", engine[1])),
        (manifest, ("MODEL.onnx", graph[1]), engine),
        (manifest, graph, engine, ("more", b"")),
        (manifest, graph),
    ):
        repack(packed, *members)
        refuses(packed, "is damaged at byte|its manifest asks for")
    repack(packed, graph, manifest, engine)
    refuses(packed, r"is not a bundle: it does not begin with manifest\.json")


def test_packed_sizes_that_are_not_there(packed: Path) -> None:
    manifest, graph, engine = contents(packed)
    for size in (TEN_GB, 8**11 - 1, 2**62):
        packed.write_bytes(member(*manifest, size) + member(*graph))
        refuses(packed, "its manifest is larger than|is not a bundle")
        data = unseal(manifest[1])
        data["files"][ENGINE]["bytes"] = size
        repack(packed, ("manifest.json", reseal(data)), graph, engine)
        refuses(packed, "its manifest asks for")
    packed.write_bytes(member(*manifest, LARGEST_MANIFEST) + member(*graph))
    refuses(packed, "ends within its manifest")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_a_packed_member_that_is_no_file(kind: bytes, packed: Path) -> None:
    with (
        tarfile.open(packed) as old,
        tarfile.open(fileobj=(new := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as out,
    ):
        for item in old:
            if item.name == ENGINE:
                item.type, item.linkname, item.size = kind, "/etc/passwd", 0
                out.addfile(item)
            else:
                out.addfile(item, old.extractfile(item))
    packed.write_bytes(new.getvalue())
    refuses(packed, "is damaged at byte|its manifest asks for")


def test_archives_of_another_kind(packed: Path, tmp_path: Path) -> None:
    """Neither a zip, whose two directories can disagree, nor anything compressed, which can grow."""
    with zipfile.ZipFile(tmp_path / "zip.vmkd", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (*contents(packed), ("model.onnx", b"twice"), ("bomb", bytes(10**7))):
            with pytest.warns(UserWarning, match="Duplicate") if data == b"twice" else nullcontext():
                archive.writestr(name, data)
    with tarfile.open(tmp_path / "gz.vmkd", "w:gz") as archive:
        archive.add(packed, "manifest.json")
    for name in ("zip.vmkd", "gz.vmkd"):
        refuses(tmp_path / name, "is not a bundle: it does not begin with")


def test_a_packed_bundle_that_is_a_pipe_or_a_link_to_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.vmkd")
    (tmp_path / "zero.vmkd").symlink_to("/dev/zero")
    for name in ("pipe.vmkd", "zero.vmkd"):
        refuses(tmp_path / name, "is not a bundle")
