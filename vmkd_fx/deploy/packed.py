"""A bundle in one file: a plain tar archive, every byte of which follows from the manifest and the files.

    manifest.json, then the other files by name, each behind a header of 512 bytes and padded to 512;
    1024 zeros

`tar xf model.vmkd` gives the folder form. Nothing is compressed, so every file can be read where it lies, and
a size is what it says. A header holds a name and a size and nothing else (no owner, no date), so the reader
writes the header that it expects and compares; it interprets none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from vmkd_fx.deploy.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, parse_manifest
from vmkd_fx.deploy.places import Place, Source, copy, open_plain
from vmkd_fx.errors import BundleError

SUFFIX = ".vmkd"

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_LARGEST_OCTAL = 8**11


def header(name: str, size: int) -> bytes:
    """The tar header (ustar, 512 bytes) of a plain file; sizes from 8 GiB as GNU tar writes them."""
    length = b"%011o\0" % size if size < _LARGEST_OCTAL else b"\x80" + size.to_bytes(11, "big")
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        length + b"00000000000\0",
        b" " * 8 + b"0" + bytes(100) + b"ustar\x0000",
    )
    block = b"".join(fields).ljust(_BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def begins_packed(path: Path) -> bool:
    """Whether `path` is a file that begins as a packed bundle does."""
    try:
        with open_plain(path) as file:
            return file.read(100) == MANIFEST.encode().ljust(100, b"\0")
    except BundleError:
        return False


def write_packed(file: BinaryIO, manifest: Manifest, sources: Mapping[str, Source]) -> None:
    """Write the bundle of `manifest` and the files in `sources` to `file`.

    Raises:
        BundleError: a source is not what the manifest says.
    """
    raw = manifest.to_bytes()
    file.write(header(MANIFEST, len(raw)) + raw + _padding(len(raw)))
    for name in sorted(manifest.files):
        entry = manifest.files[name]
        file.write(header(name, entry.bytes))
        copy(sources[name], entry.sha256, file)
        file.write(_padding(entry.bytes))
    file.write(_END)


def read_packed(path: Path) -> tuple[Manifest, dict[str, Place]]:
    """The manifest of the packed bundle `path`, and where each of its files lies in it.

    All that is no file's contents is compared with what `write_packed` writes; the contents are not read.

    Raises:
        BundleError: it is no packed bundle, or was cut, lengthened or changed.
    """
    with open_plain(path) as file:
        manifest, first = _manifest(file, path)
        places, end = _layout(path, manifest, first)
        total, expected = file.seek(0, 2), end + len(_END)
        if total != expected:
            raise BundleError(
                f"{path} has {total:,} bytes, its manifest asks for {expected:,}: copy it again"
            )
        for name, place in places.items():
            _expect(file, path, place.offset - _BLOCK, header(name, place.size), name)
            _expect(file, path, place.offset + place.size, _padding(place.size), name)
        _expect(file, path, end, _END, "the end")
    return manifest, places


def _layout(path: Path, manifest: Manifest, position: int) -> tuple[dict[str, Place], int]:
    """Where each file lies, if the first header stands at `position`, and where they end."""
    places = {}
    for name in sorted(manifest.files):
        size = manifest.files[name].bytes
        places[name] = Place(path, position + _BLOCK, size)
        position += _BLOCK + size + len(_padding(size))
    return places, position


def _manifest(file: BinaryIO, path: Path) -> tuple[Manifest, int]:
    """The manifest, and where the first header behind it begins."""
    first = file.read(_BLOCK)
    size = _octal(first[124:135])
    if size is None or first != header(MANIFEST, size):
        raise BundleError(
            f"{path} is not a bundle: it does not begin with {MANIFEST}, packed as vmkd-fx packs it"
        )
    if size > LARGEST_MANIFEST:
        raise BundleError(f"{path}: its manifest is larger than the {LARGEST_MANIFEST:,} bytes it may have")
    raw = file.read(size)
    if len(raw) < size:
        raise BundleError(f"{path} ends within its manifest: copy it again")
    manifest = parse_manifest(raw, f"{path}: {MANIFEST}")
    _expect(file, path, _BLOCK + size, _padding(size), MANIFEST)
    return manifest, _BLOCK + size + len(_padding(size))


def _expect(file: BinaryIO, path: Path, position: int, expected: bytes, name: str) -> None:
    file.seek(position)
    if file.read(len(expected)) != expected:
        raise BundleError(
            f"{path} is damaged at byte {position:,}, around {name}: it was cut or changed; copy it again"
        )


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _octal(digits: bytes) -> int | None:
    return int(digits, 8) if len(digits) == 11 and digits.strip(b"01234567") == b"" else None
