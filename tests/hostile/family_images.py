"""Pictures and zip archives that are damaged, declare too much or are something else."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from hostile.cases import TEXTS, Case
from PIL import Image


def encoded(kind: str = "PNG", size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG that declares a size, with these unpacked rows of 8-bit grey."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def member(data: bytes, method: int = zipfile.ZIP_STORED, name: str = "a.png") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def spoilt(archive: bytes) -> bytes:
    """The archive with the middle of its compressed member overwritten."""
    start, end = 30 + 5, archive.index(b"PK\x01\x02")
    middle = (start + end) // 2
    changed = archive[:middle] + bytes(byte ^ 0x5A for byte in archive[middle : middle + 40]) + archive[middle + 40 :]
    assert changed != archive
    return changed


def with_fields(archive: bytes, **fields: int) -> bytes:
    """The archive with other values in the header and the directory entry of its only member."""
    places = {"flags": (6, 8, "<H"), "method": (8, 10, "<H"), "packed": (18, 20, "<I"), "size": (22, 24, "<I")}
    data, entry = bytearray(archive), archive.index(b"PK\x01\x02")
    for name, value in fields.items():
        local, central, kind = places[name]
        struct.pack_into(kind, data, local, value)
        struct.pack_into(kind, data, entry + central, value)
    return bytes(data)


WHOLE = encoded(size=(90, 90))
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "corrupt deflate": lambda: spoilt(member(WHOLE, zipfile.ZIP_DEFLATED)),
    "corrupt bzip2": lambda: spoilt(member(WHOLE, zipfile.ZIP_BZIP2)),
    "corrupt LZMA": lambda: spoilt(member(WHOLE, zipfile.ZIP_LZMA)),
    "LZMA without its header": lambda: with_fields(member(WHOLE), method=zipfile.ZIP_LZMA),
    "bzip2 that is none": lambda: with_fields(member(WHOLE), method=zipfile.ZIP_BZIP2),
    "deflate that is none": lambda: with_fields(member(WHOLE), method=zipfile.ZIP_DEFLATED),
    "unknown compression": lambda: with_fields(member(WHOLE), method=77),
    "encrypted": lambda: with_fields(member(WHOLE), flags=1),
    "declares 4 GB": lambda: with_fields(member(WHOLE), size=2**32 - 2),
    "declares less than it is": lambda: with_fields(member(bytes(2**27), zipfile.ZIP_DEFLATED), size=1000),
    "LZMA bomb": lambda: with_fields(member(bytes(2**27), zipfile.ZIP_LZMA), size=1000),
    "bzip2 bomb": lambda: with_fields(member(bytes(2**27), zipfile.ZIP_BZIP2), size=1000),
    "image bomb within": lambda: member(png(60_000, 60_000, bytes(1000))),
}
IMAGES: dict[str, Callable[[], bytes]] = {
    "declares 60,000 x 60,000": lambda: png(60_000, 60_000, bytes(1000)),
    "declares 2^31 x 1": lambda: png(2**31 - 1, 1, bytes(1000)),
    "is 10,000 x 10,000": lambda: png(10_000, 10_000, bytes(10_001 * 10_000)),
    "no width": lambda: png(0, 10, bytes(10)),
    "no rows": lambda: png(10, 10, b""),
    "too many rows": lambda: png(10, 10, bytes(10**7)),
    "broken PNG chunk": lambda: encoded()[:40] + b"\xff" * 20 + encoded()[60:],
    "text chunk without end": lambda: encoded().replace(b"IDAT", b"zTXt", 1),
    "GIF": lambda: encoded("GIF"),
    "TIFF": lambda: encoded("TIFF"),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "WebP cut short": lambda: encoded("WEBP")[:40],
    "JPEG without an end": lambda: encoded("JPEG", (300, 300))[:-4000],
    "JPEG that claims 65,500 x 65,500": lambda: encoded("JPEG").replace(
        b"\x08" + struct.pack(">HH", 20, 30), b"\x08" + struct.pack(">HH", 65_500, 65_500)
    ),
}
ODD: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "random": lambda path: path.symlink_to("/dev/urandom"),
    "loop": lambda path: path.symlink_to(path.name),
    "folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("nowhere"),
}


def release(folder: Path, skip: bool) -> tuple[Path, list[str]]:
    """A data set in IISAN's format whose items have pictures, and the command that prepares it."""
    source = folder / "source"
    (source / "images").mkdir(parents=True)
    names = [f"i{number}" for number in range(7)]
    (source / "items.tsv").write_text("".join(f"{name}\ttitle\n" for name in names))
    (source / "users.tsv").write_text(f"u\t{' '.join(names)}\n")
    for name in names:
        (source / "images" / f"{name}.png").write_bytes(WHOLE)
    arguments = ["prepare", "iisan", "source", "data", "--image-size", "4", "--workers", "1"]
    return source, [*arguments, *(["--skip-bad"] if skip else [])]


def picture(content: Callable[[], bytes], skip: bool, folder: Path) -> list[str]:
    """One picture is something else."""
    source, arguments = release(folder, skip)
    (source / "images" / "i3.png").write_bytes(content())
    return arguments


def odd(make: Callable[[Path], object], place: str, folder: Path) -> list[str]:
    """A picture, a table or the folder of pictures is no file."""
    source, arguments = release(folder, skip=False)
    (source / place).rename(folder / "moved")
    make(source / place)
    return arguments


def archived(content: Callable[[], bytes], folder: Path) -> list[str]:
    """The pictures are in an archive of one member."""
    source, arguments = release(folder, skip=False)
    (folder / "images.zip").write_bytes(content())
    (source / "items.tsv").write_text("a\ttitle\n")
    (source / "users.tsv").write_text("u\ta a a a a\n")
    return [*arguments, "--images", "images.zip"]


def cases() -> Iterator[Case]:
    """Yield pictures with and without --skip-bad, archives, names in archives, and what is no file x places."""
    for name, content in IMAGES.items():
        for skip in (False, True):
            yield Case(f"picture-{name}{'-skip' * skip}", partial(picture, content, skip))
    for name, content in ARCHIVES.items():
        yield Case(f"archive-{name}", partial(archived, content))
    for name, text in TEXTS.items():
        entry = f"{text[:100]}a.png".replace("\0", "")
        yield Case(f"archive-name-{name}", partial(archived, partial(member, WHOLE, name=entry)))
    for kind, make in ODD.items():
        for place in ("images/i3.png", "items.tsv", "users.tsv", "images"):
            yield Case(f"picture-{kind}-{place}", partial(odd, make, place))
