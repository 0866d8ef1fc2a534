"""Crops and drawn rows for the photometric chain, and the chain by NumPy in float64 and by Pillow in 8 bits."""

import colorsys
import itertools

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from fastmoco.kernels.reference import (
    BRIGHTNESS,
    FLIP,
    GRAY,
    GRAY_AFTER_JITTER,
    GRAY_BEFORE_JITTER,
    HUE,
    NO_JITTER,
    ORDER,
    SIGMA,
)

LUMA = np.array([0.299, 0.587, 0.114])
NAMES = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(range(4)))


def order_code(order):
    return sum(code << 2 * position for position, code in enumerate(order))


def identity(n):
    parameters = torch.zeros(n, 8)
    parameters[:, ORDER] = NO_JITTER
    parameters[:, BRIGHTNESS:HUE] = 1
    return parameters


def draws(n, kind, seed=0):
    """Rows as MoCo v1 or v2 draws them (facts of the published recipes), orders taken in turn."""
    rng, rows = np.random.default_rng(seed), identity(n)
    for i, row in enumerate(rows):
        jitter = kind == "v1" or rng.random() < 0.8
        row[ORDER] = order_code(ORDERS[(5 * i + 7 * seed) % 24]) if jitter else NO_JITTER
        row[BRIGHTNESS:HUE] = torch.tensor(rng.uniform(0.6, 1.4, 3))
        row[HUE] = rng.uniform(-0.4, 0.4) if kind == "v1" else rng.uniform(-0.1, 0.1)
        row[GRAY] = (rng.random() < 0.2) * (GRAY_BEFORE_JITTER if kind == "v1" else GRAY_AFTER_JITTER)
        row[SIGMA] = (kind == "v2" and rng.random() < 0.5) * rng.uniform(0.1, 2)
        row[FLIP] = rng.random() < 0.5
    return rows


def photos(n, size, seed=0):
    """Smooth colour fields with edges and noise: many hues, dark and clipped areas."""
    rng, at = np.random.default_rng(seed), np.linspace(0, 6, size)
    y, x = np.meshgrid(at, at, indexing="ij")
    waves = np.stack(
        [np.sin(rng.uniform(0.3, 2, (n, 1, 1)) * (x + c) + rng.uniform(0, 6, (n, 1, 1)) * y) for c in range(3)], -1
    )
    boxes = rng.uniform(-60, 60, (n, 1, 1, 3)) * ((x > 2) & (y > 3))[None, :, :, None]
    noise = rng.normal(0, 6, (n, size, size, 3))
    return torch.from_numpy(np.clip(120 + 110 * waves + boxes + noise, 0, 255).astype(np.uint8))


# A second implementation, in NumPy float64 and the standard library.


def numpy_jitter(x, code, factor):
    if code == 3:
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
        return np.array([colorsys.hsv_to_rgb((h + factor) % 1, s, v) for h, s, v in hsv]).reshape(x.shape)
    gray = (x @ LUMA)[..., None]
    center = (0.0, gray.mean(), gray)[code]
    return np.clip(factor * x + (1 - factor) * center, 0, 1)


def numpy_blur(x, sigma, radius):
    taps = np.arange(-radius, radius + 1)
    kernel = np.exp(-(taps**2) / (2 * sigma**2))
    for axis in (0, 1):
        padded = np.pad(x, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        x = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), "valid")
    return x


def numpy_view(crop, row, jitter=numpy_jitter):
    x = crop.numpy() / 255
    row = row.double().numpy()
    if row[GRAY] == GRAY_BEFORE_JITTER:
        x = np.repeat((x @ LUMA)[..., None], 3, -1)
    if row[ORDER] >= 0:
        for code in (int(row[ORDER]) >> 2 * position & 3 for position in range(4)):
            x = jitter(x, code, row[BRIGHTNESS + code])
    if row[GRAY] == GRAY_AFTER_JITTER:
        x = np.repeat((x @ LUMA)[..., None], 3, -1)
    if row[SIGMA] > 0:
        x = numpy_blur(x, row[SIGMA], min(int(np.ceil(3 * row[SIGMA])), x.shape[0] - 1))
    return x[:, ::-1] if row[FLIP] else x


def numpy_views(crops, parameters, **options):
    return 255 * np.stack([numpy_view(crop, row, **options) for crop, row in zip(crops, parameters)])


# A third, in Pillow, which rounds to 8 bits after each operation.


def pillow_jitter(image, code, factor):
    if code < 3:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[code]
        return enhance(image).enhance(factor)
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue).astype(np.int64) + round(factor * 255)
    hue = Image.fromarray((turned % 256).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def pillow_view(crop, row):
    image = Image.fromarray(crop)
    if row[GRAY] == GRAY_BEFORE_JITTER:
        image = image.convert("L").convert("RGB")
    if row[ORDER] >= 0:
        for code in (int(row[ORDER]) >> 2 * position & 3 for position in range(4)):
            image = pillow_jitter(image, code, row[BRIGHTNESS + code])
    if row[GRAY] == GRAY_AFTER_JITTER:
        image = image.convert("L").convert("RGB")
    if row[SIGMA] > 0:
        image = image.filter(ImageFilter.GaussianBlur(row[SIGMA]))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row[FLIP] else image)


def pillow_views(crops, parameters):
    return np.stack([pillow_view(crop.numpy(), row.tolist()) for crop, row in zip(crops, parameters)])


def one_jitter(code, factor, n=1):
    """Rows of which only one jitter does anything (the others have their identity factor)."""
    rows = identity(n)
    rows[:, ORDER] = order_code([code, *(other for other in range(4) if other != code)])
    rows[:, BRIGHTNESS + code] = factor
    return rows
