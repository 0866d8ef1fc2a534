"""The plan: which samples, boxes, flips, photometric parameters and shuffles, as a pure function.

Every draw is a counter-based hash of (seed, stream, epoch or step, sample, view, number of the draw). There is no
generator and so no state: any step can be planned at any time, on any rank, in any order, with the same result. The
order of the images stands in `order.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastmoco.data.draws import BOX_STREAM, PHOTOMETRIC_STREAM, SHUFFLE_STREAM, hash_words, uniform
from fastmoco.data.order import ShardRows, order_for
from fastmoco.recipe import Recipe, RecipeError

# Columns of the photometric parameters. kernels/reference.py, which this module must not import because of torch,
# names them too; a test keeps the two equal.
FLIP, GRAY, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA = range(8)
GRAY_NEVER, GRAY_BEFORE_JITTER, GRAY_AFTER_JITTER = 0, 1, 2
NO_JITTER = -1

BOX_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many
CENTRE_SHARE, CENTRE_FROM = 0.875, 64
# The 24 orders of brightness 0, contrast 1, saturation 2 and hue 3, each as four 2-bit codes, first one lowest.
ORDER_CODES = np.array(
    [sum(op << 2 * place for place, op in enumerate(order)) for order in itertools.permutations(range(4))]
)


class Sizes(Protocol):
    """Height and width of n images, int32 [n, 2]: an array, or a column of a file that is read where it is asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, 2)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Plan:
    """What each step of a run looks at.

    `sizes` is int32 [n, 2], height and width of every image, as an array or a column of a file. A step's global batch
    has B = recipe.batch_size slots; rank r holds query slots and key positions [r * B / world, (r + 1) * B / world).
    Steps count over the whole run. `shards` says which images each tar archive holds, for an order by windows of them.
    Raises RecipeError if the batch does not split over the ranks, the images do not fill one batch, or the order needs
    shards and there are none.
    """

    def __init__(
        self, recipe: Recipe, sizes: Sizes, world: int = 1, rank: int = 0, shards: ShardRows | None = None
    ) -> None:
        self.recipe, self.world, self.rank = recipe, world, rank
        self.per_rank = recipe.check_ranks(world)
        self.sizes = np.ascontiguousarray(sizes, np.int32).reshape(-1, 2) if isinstance(sizes, np.ndarray) else sizes
        if len(self.sizes) < recipe.batch_size:
            unit = world * max(1, recipe.bn_group)
            fitting = len(self.sizes) // unit * unit
            share = len(self.sizes) // world
            remedy = f"use --batch-size {fitting} or less" if fitting else "use more images"
            if share and not fitting:
                remedy += f", or --batch-size {share * world} --bn-group {share}"
            raise RecipeError(
                f"batch_size {recipe.batch_size} is more than the {len(self.sizes)} images there are: {remedy}"
            )
        self.steps_per_epoch = len(self.sizes) // recipe.batch_size
        self._order = order_for(recipe, len(self.sizes), shards)

    @property
    def key_views(self) -> tuple[int, ...]:
        """Views whose crops travel to where the shuffle sends them: the second; both when a queue is symmetric.

        A bank takes its keys from earlier steps: none.
        """
        if self.recipe.dictionary == "bank":
            return ()
        return (0, 1) if self.recipe.views == 2 else (1,)

    @property
    def query_views(self) -> tuple[int, ...]:
        """Views that stay where their samples are: the first; both when a queue is symmetric."""
        return (0, 1) if self.recipe.views == 2 else (0,)

    @property
    def views(self) -> tuple[int, ...]:
        """Views of a sample that are cut at all."""
        return tuple(sorted({*self.query_views, *self.key_views}))

    def epoch(self, step: int) -> int:
        """Epoch that `step` belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of all samples in `epoch`, int64 [n]."""
        return self._order(epoch, np.arange(len(self.sizes)))

    def samples(self, step: int) -> np.ndarray:
        """Samples in the slots of the global batch, int64 [B]. The incomplete batch at an epoch's end is left out."""
        first = step % self.steps_per_epoch * self.recipe.batch_size
        return self._order(self.epoch(step), np.arange(first, first + self.recipe.batch_size))

    def windows(self, step: int, ahead: int = 0) -> list[np.ndarray]:
        """Shards int64 [at most W] of each window that `step` shows images of, and of those in the `ahead` images after
        them, in the next epoch too; nothing where the order has no windows."""
        epoch, end = self.epoch(step), self.steps_per_epoch * self.recipe.batch_size
        first = step % self.steps_per_epoch * self.recipe.batch_size
        last = first + self.recipe.batch_size + ahead
        following = self._order.windows(epoch + 1, 0, min(last - end, end)) if last > end else []
        return self._order.windows(epoch, first, min(last, end)) + following

    def boxes(self, epoch: int, samples: np.ndarray, view: int) -> np.ndarray:
        """Crop boxes (top, left, height, width), int32 [m, 4]: torchvision's RandomResizedCrop.

        Ten tries at an area and a log-uniform aspect ratio; where none fits the image, the largest centred box whose
        ratio is allowed.
        """
        augmentation = self.recipe.augmentation
        samples = np.asarray(samples, np.int64)
        numbers = np.arange(2 * BOX_TRIES + 2)
        draws = uniform(self.recipe.seed, BOX_STREAM, epoch, view, samples[:, None], numbers)
        height, width = self.sizes[samples].astype(np.float64).T
        area = (height * width)[:, None] * _between(draws[:, 0 : 2 * BOX_TRIES : 2], *augmentation.crop_scale)
        ratio = np.exp(_between(draws[:, 1 : 2 * BOX_TRIES : 2], *np.log(augmentation.crop_ratio)))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        fit, first = fits.any(1), fits.argmax(1)[:, None]
        h, w = (np.take_along_axis(side, first, 1)[:, 0] for side in (h, w))
        centred_h, centred_w = _largest_sides(height, width, *augmentation.crop_ratio)
        h, w = np.where(fit, h, centred_h), np.where(fit, w, centred_w)
        top = np.where(fit, np.floor(draws[:, -2] * (height - h + 1)), (height - h) // 2)
        left = np.where(fit, np.floor(draws[:, -1] * (width - w + 1)), (width - w) // 2)
        return np.stack([top, left, h, w], 1).astype(np.int32)

    def photometric(self, epoch: int, samples: np.ndarray, view: int) -> np.ndarray:
        """Photometric parameters, float32 [m, 8], columns FLIP to SIGMA; hue in turns, sigma in pixels of the crop."""
        augmentation = self.recipe.augmentation
        samples = np.asarray(samples, np.int64)
        draws = uniform(self.recipe.seed, PHOTOMETRIC_STREAM, epoch, view, samples[:, None], np.arange(10)).T
        strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
        jittered = (draws[2] < augmentation.jitter_p) & any(strengths)
        shifts = [np.where(jittered, _between(u, -s, s), 0.0) for u, s in zip(draws[4:8], strengths, strict=True)]
        result = np.empty((len(samples), 8), np.float32)
        result[:, FLIP] = draws[0] < augmentation.flip_p
        gray = GRAY_BEFORE_JITTER if augmentation.gray_first else GRAY_AFTER_JITTER
        result[:, GRAY] = np.where(draws[1] < augmentation.gray_p, gray, GRAY_NEVER)
        codes = ORDER_CODES[(draws[3] * len(ORDER_CODES)).astype(np.int64)]
        result[:, ORDER] = np.where(jittered, codes, NO_JITTER)
        result[:, BRIGHTNESS], result[:, CONTRAST], result[:, SATURATION] = (1 + shift for shift in shifts[:3])
        result[:, HUE] = shifts[3]
        blurred = draws[8] < augmentation.blur_p
        result[:, SIGMA] = np.where(blurred, _between(draws[9], *augmentation.blur_sigma), 0.0)
        return result

    def shuffle(self, step: int, view: int) -> np.ndarray:
        """Permutation of the key batch, int64 [B]: its position p holds slot perm[p]; identity without shuffle_bn."""
        slots = np.arange(self.recipe.batch_size)
        if not self.recipe.shuffle_bn:
            return slots
        return np.argsort(hash_words(self.recipe.seed, SHUFFLE_STREAM, step, view, slots), kind="stable")


def centre_boxes(sizes: np.ndarray, crop_size: int) -> np.ndarray:
    """The centred square that evaluation looks at, for sizes int32 [n, 2]: boxes int32 [n, 4].

    Its side is 7/8 of the shorter side, which is torchvision's Resize(256), CenterCrop(224); below 64 pixels, where
    images are seldom larger than the crop, all of the shorter side.
    """
    shorter = sizes.min(1)
    side = np.maximum(np.rint(shorter * CENTRE_SHARE), 1).astype(np.int32) if crop_size >= CENTRE_FROM else shorter
    return np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], 1).astype(np.int32)


class Route(NamedTuple):
    """Where one rank's key crops go and where the ones it encodes come from. V key views, N slots a rank, M = V * N."""

    send_rows: np.ndarray
    """int64 [M]: rows of this rank's crops (view by view, slot by slot) in the order they are sent."""
    send_counts: list[int]
    """Crops for each rank."""
    slots: np.ndarray
    """int64 [M]: slot of the global batch of each arriving crop."""
    views: np.ndarray
    """int64 [M]: which of the V key views each arriving crop is, counted from 0."""
    receive_counts: list[int]
    """Crops from each rank."""
    key_rows: np.ndarray
    """int64 [M]: row of this rank's key batch (view by view) that each arriving crop is written to."""
    unshuffle: np.ndarray
    """int64 [V * B]: row of the keys gathered rank by rank [world * M] for each view and slot, view by view."""


def route(shuffles: Sequence[np.ndarray], world: int, rank: int) -> Route:
    """Index arithmetic of the batch-norm shuffle: one permutation of the global batch for each key view.

    Crops travel ordered by receiver, then view, then slot, so that on one rank they arrive in the order they stand in
    and nothing needs to be moved.
    """
    if not shuffles:
        nothing = np.empty(0, np.int64)
        return Route(nothing, [0] * world, nothing, nothing, [0] * world, nothing, nothing)
    place = np.argsort(np.stack(shuffles), axis=1)
    views, batch = place.shape
    n = batch // world
    encoder = place // n  # rank that encodes each view and slot
    row = np.arange(views)[:, None] * n + place % n  # and its row there
    mine = encoder[:, rank * n : (rank + 1) * n].ravel()
    view, slot = np.nonzero(encoder == rank)
    arrival = np.argsort(slot // n, kind="stable")
    view, slot = view[arrival], slot[arrival]
    return Route(
        send_rows=np.argsort(mine, kind="stable"),
        send_counts=np.bincount(mine, minlength=world).tolist(),
        slots=slot,
        views=view,
        receive_counts=np.bincount(slot // n, minlength=world).tolist(),
        key_rows=row[view, slot],
        unshuffle=(encoder * views * n + row).ravel(),
    )


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + u * (high - low)


def _largest_sides(height: np.ndarray, width: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    ratio = width / height
    return (
        np.where(ratio < low, np.maximum(np.rint(width / low), 1), height),
        np.where(ratio > high, np.maximum(np.rint(height * high), 1), width),
    )
