"""One image as an encoder takes it: what evaluation does with a whole set, for a picture at hand."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmoco.data.errors import DataError
from fastmoco.data.plan import centre_boxes
from fastmoco.data.rewrite import DamagedImage, Reading, colour, compose, rewritten
from fastmoco.kernels.reference import resize_box
from fastmoco.recipe import Recipe

Picture = Image.Image | np.ndarray | str | os.PathLike


@dataclass(frozen=True)
class Transform:
    """Picture -> float32 [3, S, S]: its centre square, resized to the size of training, normalised by channel.

    A picture is a Pillow image, the path of a file, or uint8 [H, W, 3] (RGB) or [H, W] (grey). The square is 7/8 of the
    shorter side, all of it where S is below 64. Transparency and numbers are read as the run read them; the orientation
    that EXIF asks for is ignored, as in training. It can be the `transform` of a torchvision data set.

    Calling it raises DataError if a file cannot be decoded, ValueError if an array is of another kind, OSError if there
    is no such file.
    """

    crop_size: int
    """S, in pixels."""
    mean: tuple[float, float, float]
    """Of each RGB channel, of values in [0, 1]."""
    std: tuple[float, float, float]
    """Divided by, for each RGB channel."""
    reading: Reading = Reading()
    """Background of transparent pictures, and which numbers are black and white."""

    @classmethod
    def of(cls, recipe: Recipe) -> Transform:
        """That of a run."""
        colours = recipe.augmentation
        return cls(recipe.crop_size, colours.mean, colours.std, Reading.of(recipe))

    def __call__(self, picture: Picture) -> Tensor:
        """The tensor [3, S, S] of one picture."""
        pixels = self._pixels(picture)
        box = centre_boxes(np.array([pixels.shape[:2]], np.int32), self.crop_size)[0]
        square = torch.empty(3, self.crop_size, self.crop_size, dtype=torch.uint8)
        resize_box(pixels, box.tolist(), square)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (square.float() / 255 - mean) / std

    def _pixels(self, picture: Picture) -> np.ndarray:
        if isinstance(picture, Image.Image):
            return _rgb(picture, self.reading.background)
        if isinstance(picture, (str, os.PathLike)):
            return self._decode(Path(picture))
        array = np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
            raise ValueError(
                f"a picture is a Pillow image, a path, uint8 [H, W, 3] or [H, W], not {array.dtype} {list(array.shape)}"
            )
        return np.repeat(array[..., None], 3, 2) if array.ndim == 2 else array

    def _decode(self, path: Path) -> np.ndarray:
        try:
            return decoded(np.frombuffer(path.read_bytes(), np.uint8), self.reading)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def decoded(data: np.ndarray, reading: Reading) -> np.ndarray:
    """An encoded image uint8 [size] as evaluation sees it: uint8 [H, W, 3] (RGB).

    Transparency and numbers are read as `reading` says. Raises DataError if it is damaged, or of a kind that Pillow
    does not read.
    """
    data_or_fault = rewritten(data, reading)
    if isinstance(data_or_fault, DamagedImage):
        raise DataError(str(data_or_fault))
    try:
        with Image.open(io.BytesIO(data_or_fault.tobytes())) as image:
            return _rgb(image, reading.background)
    except (OSError, SyntaxError, ValueError) as error:  # how Pillow says that something is no image, or damaged
        raise DataError("not an image, or damaged: cannot be decoded") from error


def _rgb(image: Image.Image, background: str) -> np.ndarray:
    if image.mode.startswith("I"):  # grey of 16 bits
        return _grey((np.asarray(image).astype(np.int64) + 128) // 257)
    if image.mode == "F" and image.format == "TIFF":  # white is 1 in a file, but 255 where Pillow converts to floats
        return _grey(np.nan_to_num(np.asarray(image) * np.float32(255)).clip(0, 255).round())
    if background == "ignore" or not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    pixels = np.asarray(image.convert("RGBA"))
    return compose(pixels[..., :3], pixels[..., 3], colour(background))


def _grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.clip(0, 255).astype(np.uint8)[..., None], 3, 2)
