"""Item images in a folder or a zip archive, found by item name and decoded when they are asked for."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tpme.bench.errors import UserError
from tpme.bench.task.sources.raw import Picture
from tpme.bench.task.sources.reading import Complaints

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# A picture that unpacks to more than this is no product photo but an accident or an attack.
MAX_ENTRY_BYTES = 256 * 2**20

_UNREADABLE = (
    OSError,
    SyntaxError,  # what Pillow raises for a broken PNG
    ValueError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
    RuntimeError,  # an encrypted zip entry
    NotImplementedError,  # an unknown zip compression
)


@dataclass(frozen=True)
class FilePicture:
    """One image file."""

    path: Path

    def __call__(self, size: int) -> NDArray[np.uint8]:
        """Decode to uint8 (3, size, size). Raises UserError naming the file."""
        try:
            with self.path.open("rb") as file:
                return decode_image(file, size)
        except _UNREADABLE as error:
            raise UserError(f"{self.path}: {_why(error)}") from None


@dataclass(frozen=True)
class ZipPicture:
    """One image inside a zip archive; it is never unpacked to the disk."""

    archive: Path
    entry: str

    def __call__(self, size: int) -> NDArray[np.uint8]:
        """Decode to uint8 (3, size, size). Raises UserError naming archive and entry."""
        try:
            return decode_image(io.BytesIO(self._read()), size)
        except _UNREADABLE as error:
            raise UserError(f"{self.archive}, entry '{self.entry}': {_why(error)}") from None

    def _read(self) -> bytes:
        archive = _opened(self.archive)
        if archive.getinfo(self.entry).file_size > MAX_ENTRY_BYTES:
            raise ValueError(f"unpacks to more than {MAX_ENTRY_BYTES // 2**20} MiB")
        return archive.read(self.entry)


@lru_cache(maxsize=2)
def _opened(path: Path) -> zipfile.ZipFile:
    # Once a worker process: the directory of a large archive takes longer to read than an image.
    return zipfile.ZipFile(path)


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable image (not JPEG, PNG or WebP)"
    return f"unreadable image ({str(error) or type(error).__name__})"


def decode_image(file: IO[bytes], size: int) -> NDArray[np.uint8]:
    """Decode, convert to RGB and resize bilinearly, as the image processor of ViT does.

    JPEG is decoded at the smallest of its built-in scales that is still at least twice as large as wanted: many
    times faster for product photos, and the resize still averages over several pixels.

    Returns:
        uint8 (3, size, size).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on palettes; a picture too large raises all the same
        image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
        image.draft(None, (2 * size, 2 * size))
        image.load()
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def find_pictures(path: Path, complaints: Complaints) -> dict[str, Picture]:
    """All images below a folder or in a zip archive, by file name without suffix.

    Suffixes count in any case. Hidden files, and what macOS adds to archives, are passed over.

    Raises:
        UserError: there is no such folder or archive, it cannot be read, an entry of it points outside, or two
            images have one name.
    """
    if path.is_dir():
        entries: Iterator[tuple[PurePosixPath, Picture]] = _in_folder(path)
    elif path.is_file():
        entries = _in_archive(path, complaints)
    else:
        raise UserError(f"{path}: no such image folder or zip archive")
    found: dict[str, Picture] = {}
    origin: dict[str, PurePosixPath] = {}
    for name, picture in entries:
        if name.suffix.lower() not in SUFFIXES or any(part.startswith((".", "__MACOSX")) for part in name.parts):
            continue
        if name.stem in found:
            complaints.bad("duplicate image", f"{path}: '{origin[name.stem]}' and '{name}' are both '{name.stem}'")
            continue
        found[name.stem], origin[name.stem] = picture, name
    return found


def _in_folder(folder: Path) -> Iterator[tuple[PurePosixPath, Picture]]:
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(current, name)
            yield PurePosixPath(file.relative_to(folder).as_posix()), FilePicture(file)


def _in_archive(path: Path, complaints: Complaints) -> Iterator[tuple[PurePosixPath, Picture]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: neither a folder nor a readable zip archive ({error})") from None
    for name in sorted(names):
        # Entries are only read, never unpacked; an archive with such names is still not to be trusted.
        place = PurePosixPath(name.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or PureWindowsPath(name).drive:
            complaints.bad("unsafe zip entry", f"{path}: entry '{name}' points outside the archive")
            continue
        yield place, ZipPicture(path, name)
