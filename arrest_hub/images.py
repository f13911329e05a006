"""Encoded bytes become RGB images; what cannot be decoded becomes one clear error."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from arrest_hub.errors import DataError

_ORIENTATION = 0x0112
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, RuntimeError, struct.error,
            zlib.error)  # fmt: skip


class ImageError(DataError):
    """An image (or its label) that cannot be used. ``str()`` is one line, also after a DataLoader worker raised it.

    torch re-raises a worker's error as ``type(error)(text with the worker's traceback)``; only the message
    at its end is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class UnreachableImage(ImageError):
    """The storage of an image does not answer, which says nothing of the image."""


def decode_image(value: bytes | dict[str, Any]) -> Image.Image:
    """Encoded image -> RGB image, as `upright_rgb` makes it.

    ``value`` is the bytes of a file, or a dict of ``bytes`` and ``path`` as `datasets` stores it (``path`` is
    read when ``bytes`` is None). Raises ImageError when this is no image that can be read, UnreachableImage when
    its storage does not answer.
    """
    try:
        return upright_rgb(Image.open(_open(value)))
    except Image.DecompressionBombError as error:
        raise ImageError(f"it is larger than Pillow accepts: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("it cannot be decoded (damaged, or no image of a known format)") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"it cannot be decoded ({reason})") from error


def encoded_bytes(value: Any) -> bytes | None:
    """The file of an image, as `decode_image` takes it; None if it cannot be decoded."""
    try:
        decode_image(value)
        source = _open(value)
        return Path(source).read_bytes() if isinstance(source, str) else source.getvalue()
    except (ImageError, OSError):
        return None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> RGB image, 8 bits a channel, turned upright by its EXIF orientation.

    Greyscale, 1-bit, palette and CMYK images are converted; 16-bit greyscale is scaled to 8 bits; an alpha channel is
    dropped. Raises ImageError for pixels whose range is unknown.
    """
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ImageError("it holds floating point pixels, whose range is unknown; store 8 or 16 bits")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's own advice for palettes with transparent entries
    return image.convert("RGB")


def _open(value: bytes | dict[str, Any]) -> BytesIO | str:
    if not isinstance(value, dict):
        return BytesIO(value)
    content, path = value.get("bytes"), value.get("path")
    if content is not None:
        return BytesIO(content)
    if path is None:
        raise ImageError("it is missing (no bytes and no path)")
    if "://" not in path:
        return str(path)
    try:
        with fsspec.open(path, "rb") as file:  # streams of image folders on the Hub hold hf:// paths
            return BytesIO(file.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # each storage has errors of its own, some of which are an OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreachableImage(f"it cannot be fetched ({reason}). Go on with --resume when it can") from error


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits (in 16 or 32) -> RGB; 65535 becomes 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
        raise ImageError("it holds 32-bit integers outside 0..65535, whose range is unknown; store 8 or 16 bits")
    grey = np.round(pixels / 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
