"""One picture: its bytes, whether they decode, and the RGB picture that a model sees."""

from __future__ import annotations

import functools
import io
import os
import re
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from condu_ray.data.task import Picture
from condu_ray.errors import DataError

MAX_PIXELS = 64_000_000
MAX_BYTES = 512 * 2**20
LONGEST = 100  # times the short side

# Only formats that PIL decodes by itself: some others start programs (EPS) or are no pictures of things.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """These bytes are no picture that can be used; the message says why in a few words."""


def load_picture(picture: Picture) -> Image.Image:
    """Returns the picture in mode RGB: first frame, turned as EXIF says, transparent parts white, 16 bits cut to 8.

    Opens its file anew on every call, so it may be called from any thread or process. Raises DataError if the file
    went away or changed since it was opened.
    """
    try:
        return decode(read_bytes(picture))
    except (OSError, Unreadable) as error:
        raise DataError(
            f"the picture {picture.path} cannot be read any more ({reason(error)})",
            "put it back, or remove it, and run the command again",
        ) from error


def decode(body: bytes, most: int = MAX_PIXELS) -> Image.Image:
    """Returns a picture of at most `most` pixels as `load_picture` does. Raises Unreadable."""
    image = open_image(body, most)
    turn = _TURNS.get(_orientation(image))
    image = to_rgb(image)
    return image if turn is None else image.transpose(turn)


def read_bytes(picture: Picture, file: IO[bytes] | None = None) -> bytes:
    """Returns the picture's bytes, from `file` if the caller holds its file open. Raises OSError or Unreadable."""
    if file is None:
        with open(picture.path, "rb") as opened:
            return read_bytes(picture, opened)
    size = picture.size if picture.offset >= 0 else os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise _too_large()
    file.seek(max(picture.offset, 0))
    body = file.read(picture.size if picture.offset >= 0 else MAX_BYTES + 1)
    if len(body) > MAX_BYTES:  # a device says that it has no size
        raise _too_large()
    if picture.offset >= 0 and len(body) < picture.size:
        raise Unreadable("its tar ends too early")
    return body


def inspect(body: bytes) -> tuple[int, int]:
    """Decodes a picture whole and returns its (width, height) in pixels, as seen. Raises Unreadable."""
    image = open_image(body)
    width, height = image.size
    turned = _orientation(image) >= 5
    if image.mode in ("RGB", "L"):
        # A JPEG decodes to an eighth here; its whole stream is read all the same, so damage is found.
        image.draft(image.mode, (1, 1))
        _decoded(image)
    else:
        to_rgb(image)
    return (height, width) if turned else (width, height)


def open_image(body: bytes, most: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture with its header read, not decoded yet. Raises Unreadable; `most`: pixels allowed."""
    if not body:
        raise Unreadable("empty file")
    try:
        image = Image.open(io.BytesIO(body), formats=_formats())
    except UnidentifiedImageError:
        raise Unreadable(_unknown(body)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"too large: over {most / 1e6:g} megapixels") from None
    except Exception as error:  # PIL's plugins raise anything on damaged headers
        raise Unreadable(reason(error)) from error
    width, height = image.size
    if width * height > most:
        raise Unreadable(f"too large: {width} x {height} pixels, over {most / 1e6:g} megapixels")
    if max(width, height) > LONGEST * min(width, height):  # scaled by its short side it would fill the memory
        raise Unreadable(f"{width} x {height} pixels are too long and thin")
    return image


_SVG = re.compile(rb"\s*(<\?xml[^>]*>|<!--.*?-->|<!doctype svg[^>]*>|\s)*<svg\b", re.DOTALL | re.IGNORECASE)


def _unknown(body: bytes) -> str:
    """Why a body that PIL does not know is none, naming the formats that people take for pictures all the same."""
    if body[4:8] == b"ftyp" and body[8:12] in _HEIC:
        return "HEIC, which is not read: convert it to JPEG"
    if _SVG.match(body[:2000]):
        return "SVG, which is not read: convert it to PNG"
    return "not a picture"


def _too_large() -> Unreadable:
    return Unreadable(f"too large: over {MAX_BYTES >> 20} MiB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the picture in mode RGB, from any mode that PIL opens. Raises Unreadable."""
    _decoded(image)
    try:
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise Unreadable(reason(error)) from error


def reason(error: Exception) -> str:
    """Returns why a picture cannot be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return (text or type(error).__name__).splitlines()[0][:120]


def _decoded(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:
        raise Unreadable(reason(error)) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits: integers as 16 bits, floats as 0 to 1 (0 to 255 if any is above 1)."""
    if image.mode != "F":
        greys = np.array(image, dtype=np.int32)
        np.clip(greys, 0, 65535, out=greys)
        greys += 128  # rounds to the nearest: 257 is odd, so that no value lies halfway
        greys //= 257
        return Image.fromarray(greys.astype(np.uint8))
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False)
    largest = 1 if values.max(initial=0.0) <= 1 else 255
    np.clip(values, 0, largest, out=values)
    values *= 255 / largest
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """How the picture has to be turned once it is decoded; PIL turns a TIFF itself."""
    if image.format == "TIFF":
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about the picture itself
        return 1


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
