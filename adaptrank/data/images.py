"""Decode images of every form into RGB."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptrank._errors import UserError
from adaptrank.backbones import NO_PILLOW

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
"""Endings of image files, in lower case."""

WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of Pillow whose values have 16 bits or more."""


@dataclass(frozen=True)
class StoredImage:
    """An image inside of an array or of a data set, which is read when it is decoded.

    Args:
        holder: an array (images, height, width[, channels]) of uint8, or a sequence of mappings
            with the `bytes` or the `path` of an image.
        index: number of the image.
    """

    holder: Any
    index: int

    def read(self) -> Any:
        """Return the image as an array, or as a mapping of `bytes` and `path`."""
        return self.holder[self.index]


def decode(image: Any, where: str) -> "Image":
    """Return an image in RGB, turned as its EXIF orientation says.

    Gray values are repeated, palettes are looked up, and an alpha channel is left out. Of 16 bits
    the upper 8 are kept.

    Args:
        image: a path, bytes, an array of uint8, a mapping of `bytes` and `path`, a `StoredImage`,
            or an image of Pillow.
        where: place of the row, for the error.

    Raises:
        UserError: if there is no such file, or if it cannot be decoded.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(NO_PILLOW) from error
    source = image.read() if isinstance(image, StoredImage) else image
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise UserError(f"{where} has no image: it is null. Remove or fill such rows.")
    name = f" {str(source)!r}" if isinstance(source, str | Path) else ""
    try:
        if isinstance(source, np.ndarray):
            opened = Image.fromarray(_channels_last(source))
        elif isinstance(source, Image.Image):
            opened = source
        else:
            opened = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        opened.load()
        return _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no image file{name}.") from error
    # Pillow raises errors of many classes for damaged files.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{where}: the image{name} cannot be read ({reason}). Replace it, or remove the row."
        ) from error


def _to_rgb(image: "Image") -> "Image":
    """Return an image in the mode RGB."""
    if image.mode in WIDE_MODES:
        from PIL import Image

        values = np.asarray(image).astype(np.int64)
        shift = 8 if values.max(initial=0) > 255 else 0
        return Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8)).convert("RGB")
    # A palette with transparency warns unless it gets its alpha channel first.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Return an array (height, width) or (height, width, 3 or 4) from one in another order."""
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return np.ascontiguousarray(array)


def as_bytes(array: np.ndarray, where: str) -> np.ndarray:
    """Return an array of images as uint8.

    Values from 0 to 1 are multiplied by 255 if they are floats or booleans.

    Args:
        array: (images, height, width), or with channels in front of or behind height and width.
        where: name of the array, for the error.

    Raises:
        UserError: if it has another number of dimensions, or values outside of 0 to 255.
    """
    if array.ndim not in (3, 4):
        raise UserError(
            f"{where} has the shape {array.shape}, and images need (images, height, width) or "
            "(images, height, width, channels)."
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} holds {array.dtype}, and images need numbers.")
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if not (low >= 0 and high <= 255):
        raise UserError(
            f"{where} has values from {low:g} to {high:g}, and images need 0 to 255, or 0 to 1. "
            "Scale it before it is saved."
        )
    scale = 255 if array.dtype.kind in "bf" and high <= 1 else 1
    return (array.astype(np.float64) * scale).round().astype(np.uint8)


def raw_bytes(image: Any) -> bytes:
    """Return bytes that identify an image: those of its file, or its values."""
    source = image.read() if isinstance(image, StoredImage) else image
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        return Path(source).read_bytes()
    return np.asarray(source).tobytes()
