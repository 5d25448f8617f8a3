"""Item images in a folder or a zip archive, found by item name and decoded on demand."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tpme.bench.archives import read_member
from tpme.bench.errors import UserError, one_line
from tpme.bench.parsing import read_regular
from tpme.bench.task.sources.raw import Picture
from tpme.bench.task.sources.reading import InputErrors

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# A picture that is or unpacks to more than this is not a product photo but a mistake or an attack.
MAX_ENTRY_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class FilePicture:
    """One image file."""

    path: Path

    def __call__(self, size: int) -> NDArray[np.uint8]:
        """Decode to uint8 (3, size, size). Raises UserError naming the file."""
        try:
            return decode_image(io.BytesIO(read_regular(self.path, MAX_ENTRY_BYTES)), size)
        except Exception as error:  # Pillow raises many for broken files
            raise UserError(f"{self.path}: {_describe(error, self.path)}") from None


@dataclass(frozen=True)
class ZipPicture:
    """One image in a zip archive, never unpacked to disk."""

    archive: Path
    entry: str

    def __call__(self, size: int) -> NDArray[np.uint8]:
        """Decode to uint8 (3, size, size). Raises UserError naming archive and entry."""
        try:
            return decode_image(io.BytesIO(read_member(_opened(self.archive), self.entry, MAX_ENTRY_BYTES)), size)
        except Exception as error:  # as do the decompressors of zip
            raise UserError(f"{self.archive}, entry '{self.entry}': {_describe(error, self.archive)}") from None


@lru_cache(maxsize=2)
def _opened(path: Path) -> zipfile.ZipFile:
    # Once per worker process: reading the directory of a large archive takes longer than reading an image.
    return zipfile.ZipFile(path)


def _describe(error: Exception, path: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable image (not JPEG, PNG or WebP)"
    return f"unreadable image ({str(error).removeprefix(f'{path}: ') or type(error).__name__})"


def decode_image(file: IO[bytes], size: int) -> NDArray[np.uint8]:
    """Decode, convert to RGB and resize bilinearly, like ViT's image processor.

    JPEG is decoded at the smallest of its built-in scales that is at least twice the target size: many times faster
    for product photos, and the resize still averages over several pixels.

    Returns:
        uint8 (3, size, size).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes, and large pictures, which are refused below
        image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width:,} x {image.height:,} pixels, more than {MAX_PIXELS:,}")
        image.draft(None, (2 * size, 2 * size))
        image.load()
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def find_pictures(path: Path, errors: InputErrors) -> dict[str, Picture]:
    """All images below a folder or in a zip archive, by file name without suffix.

    Suffixes match in upper and lower case. Hidden files and macOS metadata are skipped.

    Raises:
        UserError: there is no such folder or archive, it cannot be read, an entry points outside the archive, or two
            images have the same name.
    """
    if path.is_dir():
        entries: Iterator[tuple[PurePosixPath, Picture]] = _in_folder(path)
    elif path.is_file():
        entries = _in_archive(path, errors)
    else:
        raise UserError(f"{path}: no such image folder or zip archive")
    pictures: dict[str, Picture] = {}
    origin: dict[str, PurePosixPath] = {}
    for name, picture in entries:
        if name.suffix.lower() not in SUFFIXES or any(part.startswith((".", "__MACOSX")) for part in name.parts):
            continue
        if name.stem in pictures:
            message = f"{path}: '{origin[name.stem]}' and '{name}' both belong to item '{name.stem}'"
            errors.report("duplicate image", message)
            continue
        pictures[name.stem], origin[name.stem] = picture, name
    return pictures


def pictures_at(paths: Mapping[str, str], root: Path, errors: InputErrors) -> dict[str, Picture]:
    """The images that are there, by item. ``paths``: item -> path of its image, relative to a folder or zip archive.

    Raises:
        UserError: there is no such folder or archive, or it cannot be read.
    """
    if root.is_dir():
        return {item: FilePicture(root / path) for item, path in paths.items() if path and (root / path).is_file()}
    if not root.is_file():
        raise UserError(f"{root}: no such image folder or zip archive")
    entries = dict(_in_archive(root, errors))
    places = {item: PurePosixPath(path) for item, path in paths.items()}
    return {item: entries[place] for item, place in places.items() if place in entries}


def _in_folder(folder: Path) -> Iterator[tuple[PurePosixPath, Picture]]:
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(current, name)
            yield PurePosixPath(file.relative_to(folder).as_posix()), FilePicture(file)


def _in_archive(path: Path, errors: InputErrors) -> Iterator[tuple[PurePosixPath, Picture]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    except Exception as error:  # zipfile raises many for broken directories
        raise UserError(f"{path}: neither a folder nor a readable zip archive ({one_line(error)})") from None
    for name in sorted(names):
        # Entries are never unpacked, but an archive with such names is not trustworthy.
        place = PurePosixPath(name.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or PureWindowsPath(name).drive:
            errors.report("unsafe zip entry", f"{path}: entry '{name}' points outside the archive")
            continue
        yield place, ZipPicture(path, name)
