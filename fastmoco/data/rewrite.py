"""Images that DALI would misread, rewritten as files that it reads right.

DALI drops transparency, so that whatever colour lies under it shows; takes numbers to span their type, so that twelve
bits in sixteen are nearly black; and its decoder of JPEG 2000 writes beyond its memory on damaged files. Each such
image is decoded here and handed on as a PPM of eight bits, which is read alike on a CPU and on a GPU. A compressed TIFF
that is damaged it shows as black, without an error, so those are tried here first. JPEGs, nearly all images, pass
untouched.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from fastmoco.data.probe import Bytes, Header, examine
from fastmoco.environment import share_of_cores
from fastmoco.recipe import BACKGROUNDS, MOST_PIXELS, Recipe

FORMATS = ("PNG", "WEBP", "BMP", "TIFF", "JPEG2000")  # Pillow's names
CRITICAL = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the PNG chunks that pixels depend on
LARGEST = {"uint8": 255, "uint16": 65535, "float32": 1}  # the number that DALI's float decoding makes 1
TIFF_COMPRESSION = 259  # tag
STREAMS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000)  # compressions of TIFF that DALI reads: none, CCITT, LZW, JPEG ...
STATED = ("webp", "jpeg2k")  # formats whose numbers always span what their header states, as those of JPEG do
SPACE = rb"(?:\s|#[^\n]*\n)+"
PNM = re.compile(rb"P([2356])" + 3 * (SPACE + rb"(\d+)") + rb"(?:\s|#[^\n]*\n)")


class Reading(NamedTuple):
    """How the numbers in a file become colours; `Recipe` has these fields and says what they mean."""

    background: str = Recipe.background
    value_range: str | tuple[float, float] = Recipe.value_range

    @classmethod
    def of(cls, recipe: Recipe) -> Reading:
        """That of a run."""
        return cls(recipe.background, recipe.value_range)


class DamagedImage(ValueError):
    """An image cannot be decoded; the message says why, in words that follow its name."""


def rewritten(data: np.ndarray, reading: Reading) -> np.ndarray | DamagedImage:
    """The encoded image uint8 [size] as DALI shall get it, or why it cannot be decoded.

    What `examine` finds a fault with comes back as it is.
    """
    if data[:2].tobytes() == b"\xff\xd8":
        return data
    header = examine(Bytes.of(data), MOST_PIXELS)
    if header.reason:
        return data
    try:
        return _as_dali_reads_it(data, header, reading)
    except DamagedImage as error:
        return error


def _as_dali_reads_it(data: np.ndarray, header: Header, reading: Reading) -> np.ndarray:
    codec, ignored = header.codec, reading.background == "ignore"
    if codec == "png":
        data = _without_remarks(data)
    if codec == "tiff":
        _check_tiff(data)
    pixels = alpha = None
    if codec == "jpeg2k" or (header.alpha and not ignored):
        pixels, alpha = _by_pillow(data, codec)
    if alpha is None and codec != "jpeg2k":
        pixels = None  # there is no transparency after all, and DALI reads it as well
    if isinstance(reading.value_range, tuple) and codec not in STATED:
        pixels = _in_range(data, header.pixel_type, reading.value_range)
    elif codec == "pnm" and reading.value_range == "header":
        pixels = _pnm(data.tobytes())
    if pixels is not None and alpha is not None and not ignored:
        pixels = compose(pixels, alpha, colour(reading.background))
    return data if pixels is None else _ppm(pixels)


def colour(background: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a name in BACKGROUNDS or of "#rrggbb"."""
    red, green, blue = bytes.fromhex(BACKGROUNDS.get(background, background)[1:])
    return red, green, blue


def compose(pixels: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 3] with transparency uint8 [H, W] (255 is opaque) over one colour, rounded to the nearest level."""
    alpha = alpha[..., None].astype(np.uint16)
    blend = pixels * alpha + np.array(background, np.uint16) * (255 - alpha)
    return ((blend + 127) // 255).astype(np.uint8)


def _check_tiff(data: np.ndarray) -> None:
    """Damaged if the compressed pixels of a TIFF cannot be had: DALI shows black in their place, and says nothing."""
    file = io.BytesIO(data.tobytes())
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8].tobytes())  # 43: a BigTIFF
        file.seek(tags.next)
        tags.load(file)
        compression = tags.get(TIFF_COMPRESSION, 1)
    except Exception:  # in as many ways as tags can be wrong; then DALI says what it makes of them
        return
    if compression == 1:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("TIFF",)) as image:
                image.load()
    except (UnidentifiedImageError, SyntaxError, KeyError):  # pixels of a kind that Pillow does not know
        if compression not in STREAMS:
            raise DamagedImage(f"TIFF of compression {compression}, which DALI cannot decode") from None
    except Exception as error:
        raise DamagedImage("damaged: cannot be decoded") from error


def _by_pillow(data: np.ndarray, codec: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Pixels and transparency, or None for what there is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data.tobytes()), formats=FORMATS) as image:
                transparent = image.has_transparency_data
                if image.mode.startswith("I"):  # grey of 16 bits, one level of which may be transparent
                    levels = np.asarray(image).astype(np.int64)
                    level = image.info.get("transparency")
                    alpha = np.where(levels == level, 0, 255).astype(np.uint8) if transparent else None
                    return np.repeat(((levels + 128) // 257).astype(np.uint8)[..., None], 3, 2), alpha
                pixels = np.asarray(image.convert("RGBA" if transparent else "RGB"))
                return pixels[..., :3], pixels[..., 3] if transparent else None
    except Exception as error:  # damage comes out of Pillow as errors of many kinds
        if codec in ("png", "webp", "jpeg2k"):
            raise DamagedImage("damaged: cannot be decoded") from error
        return None, None  # of a kind that DALI reads and Pillow does not, and so without transparency


def _pnm(data: bytes) -> np.ndarray | None:
    """Pixels of a PNM whose header states another largest number than its type has, else None."""
    match = PNM.match(data[:4096])
    if not match:
        return None
    kind, width, height, most = map(int, match.groups())
    if most in (255, 65535) or not 0 < most < 65536:
        return None
    count = width * height * (3 if kind in (3, 6) else 1)
    try:
        if kind in (2, 3):
            numbers = np.array(re.sub(rb"#[^\n]*", b"", data[match.end() :]).split()[:count], np.int64)
        else:
            numbers = np.frombuffer(data, ">u2" if most > 255 else np.uint8, count, match.end()).astype(np.int64)
        levels = (numbers.clip(0, most) * 255 + most // 2) // most
        pixels = levels.astype(np.uint8).reshape(height, width, -1)
    except ValueError:
        raise DamagedImage("truncated") from None
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def _in_range(data: np.ndarray, pixel_type: str, value_range: tuple[float, float]) -> np.ndarray:
    low, high = value_range
    numbers = _floats.decode(data).astype(np.float64) * LARGEST[pixel_type]
    return np.nan_to_num((numbers - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


class _Floats:
    """DALI's decoding to float32 [H, W, 3], whose numbers are not cut to eight bits, from any thread."""

    def __init__(self) -> None:
        self._idle: SimpleQueue = SimpleQueue()
        self._places = threading.BoundedSemaphore(share_of_cores())

    def decode(self, data: np.ndarray) -> np.ndarray:
        """The pixels. Raises DamagedImage if they cannot be decoded."""
        with self._places:
            try:
                pipe = self._idle.get_nowait()
            except Empty:
                pipe = self._pipeline()
            try:
                pipe.feed_input("encoded", [data])
                pixels = np.array(pipe.run()[0][0])
            except RuntimeError as error:  # which ends a DALI pipeline
                raise DamagedImage("damaged: cannot be decoded") from error
            self._idle.put(pipe)
            return pixels

    @staticmethod
    def _pipeline() -> object:
        from nvidia.dali import Pipeline, fn, types  # seconds to import, and few sets need it

        pipe = Pipeline(1, 1, None, prefetch_queue_depth=1)
        with pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            options = {"output_type": types.RGB, "dtype": types.FLOAT, "adjust_orientation": False}
            pipe.set_outputs(fn.decoders.image(encoded, device="cpu", **options))
        pipe.build()
        return pipe


_floats = _Floats()


def _without_remarks(png: np.ndarray) -> np.ndarray:
    # Text, time, profiles: they change no pixel, but make decoders refuse or complain.
    data, at, chunks, whole = png.tobytes(), 8, [png[:8]], True
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in CRITICAL:
            chunks.append(png[at:end])
        whole = whole and kind in CRITICAL
        at = end
        if kind == b"IEND":
            break
    return png if whole else np.concatenate(chunks)


def _ppm(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    head = np.frombuffer(f"P6 {width} {height} 255\n".encode(), np.uint8)
    return np.concatenate([head, np.ascontiguousarray(pixels).reshape(-1)])
