"""What a run trains on and how: all that is settled before its first step."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastmoco.data import manifest, synthetic
from fastmoco.data.decoded import SMALL, PixelCache, bytes_decoded
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loading
from fastmoco.data.manifest import Manifest, ShardManifest
from fastmoco.data.plan import Plan
from fastmoco.data.remote import RemoteShards
from fastmoco.data.shard_source import Fetching, as_url
from fastmoco.environment import share_of_cores
from fastmoco.options import Options, UsageError, check_places, is_restart
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.terminal import counted

RUNS = Path("runs")
LEAST_CROP, LARGE_RATE = 12, 10.0  # below and above, a setting is seldom meant
LEAST_SEEN, MOST_ENLARGED = 8, 2  # pixels that a crop shows, and times that a view enlarges an image
LOOKED_AT = 1000  # images, all over the set, that tell how large they are: more are not read from a table on a disk
BRING_BACK = "bring the images back, or say with --data where they are now; nothing was changed"
DEMO_IMAGES = RUNS / "images"


@dataclass(frozen=True)
class Job:
    """The facts of one run on one rank."""

    preset: str
    recipe: Recipe
    """The recipe with every number known: its queue has a size."""
    options: Options
    parallel: Parallel
    train_set: Manifest
    val_set: Manifest | None
    """Labelled images for kNN; None if there are none, or none are wanted."""
    notes: tuple[str, ...]
    """Lines about the images and the queue, for people."""
    asked: Recipe | None = None
    """The recipe before the images settled what it left open."""

    @property
    def left_open(self) -> dict[str, object]:
        """Fields of `recipe` that follow the images, with what was asked for: another set settles them otherwise."""
        asked = self.recipe if self.asked is None else self.asked
        return {name: before for name, (_, before) in self.recipe.differences(asked).items()}

    @property
    def out(self) -> Path:
        """The folder of the run."""
        assert self.options.out is not None, "places() names one"
        return self.options.out

    @cached_property
    def plan(self) -> Plan:
        """Which images each step of this rank sees."""
        images = self.train_set
        return Plan(self.recipe, images.sizes, self.parallel.world, self.parallel.rank, images.shards)

    @property
    def total(self) -> int:
        """Steps of the whole schedule."""
        return self.recipe.epochs * self.plan.steps_per_epoch

    @property
    def last(self) -> int:
        """The step after which this run ends, or pauses."""
        return min(self.total, self.options.stop_after or self.total)

    @property
    def loading(self) -> Loading:
        """How batches are prepared."""
        return Loading(
            threads=self.options.threads or share_of_cores(),
            prefetch=self.options.prefetch,
            hw_decoder_load=self.options.decoder_load,
            photometric=self.options.photometric,
            decoded_bytes=self.kept_bytes[0],
        )

    @cached_property
    def kept_bytes(self) -> tuple[int, int]:
        """Bytes for decoded images of `train_set` and of `val_set`: what they take, or what there is for them.

        Those that train come first. A GPU keeps none of `val_set`: each loader works there on a stream of its own, and
        does not wait for what another one keeps.
        """
        told, on_cpu = self.options.decoded_cache, self.parallel.device.type == "cpu"
        if told is None and not on_cpu:
            return 0, 0
        room = SMALL if told is None else int(min(told * 1e9, sys.maxsize))  # inf is all
        train = bytes_decoded(self.train_set.sizes, room + (told is None))
        if train > room:  # unasked all are kept, or none
            return 0, 0
        images = self.val_set if train and on_cpu else None
        return train, 0 if images is None else bytes_decoded(images.sizes, room - train)

    def loading_with_memory(self) -> tuple[Loading, Loading]:
        """`loading` of `train_set` and of `val_set`, each with one place for decoded images, for all loaders of a run.

        Only on a CPU: see `kept_bytes`.
        """
        loading = self.loading
        if not loading.decoded_bytes or self.parallel.device.type != "cpu":
            return loading, loading
        train, val = (dataclasses.replace(loading, kept=PixelCache(size)) for size in self.kept_bytes)
        return train, val


def prepare(recipe: Recipe, options: Options, preset: str, parallel: Parallel) -> Job:
    """Look at the images and settle everything; raises DataError for bad images, RecipeError if data do not fit."""
    train_set, val_set, notes = _images(options, recipe.max_pixels)
    final = recipe.for_images(len(train_set))
    notes += _queue_notes(recipe, final, len(train_set)) + _settings_notes(final, train_set, parallel)
    notes += _decide_fetching(train_set, final)
    if train_set.transparent and final.background != "ignore":
        notes.append(
            f"{counted(train_set.transparent, 'image')} with transparency: shown over {final.background} (--background)"
        )
    return Job(preset, final, options, parallel, train_set, val_set, tuple(notes), recipe)


def places(options: Options, preset: str, parallel: Parallel) -> Options:
    """`options` with the folders that a demo brings itself; raises UsageError if one is missing or RUN is taken."""
    check_places(preset, options, parallel.is_main and not is_restart())
    return dataclasses.replace(
        options,
        # Absolute, so that the run finds them when it is resumed from another folder.
        data=_place(options.data or synthetic.make(DEMO_IMAGES)),
        val=None if options.val is None else _place(options.val),
        start_from=None if options.start_from is None else Path(os.path.abspath(options.start_from)),
        out=Path(options.out or fresh(RUNS / preset)),
    )


def _place(data: Path) -> Path:
    return data if as_url(data) else Path(os.path.abspath(data))


def fresh(path: Path) -> Path:
    """`path`, or path-2, path-3 ... if it exists."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _images(options: Options, max_pixels: int) -> tuple[Manifest, Manifest | None, list[str]]:
    assert options.data is not None and options.out is not None, "places() names both"
    train, val = manifest.split(options.data)
    file = options.out / manifest.NAME
    # A run keeps its samples, and so its plan, when files are lost or added between two of its parts.
    if file.exists():
        if not as_url(train) and not os.path.exists(train):
            raise DataError(f"{train}: no such folder, list or tar: {BRING_BACK}")
        images = Manifest.load(file, train, _fetching(options))
        notes = _after_move(images)
    else:
        images, notes = manifest.scan(train, max_pixels=max_pixels, fetching=_fetching(options)), []
    if images.rejected:
        notes.append(f"{counted(len(images.rejected), 'file')} left out: fastmoco data scan {options.data} tells which")
    against, note = _validation(options.val or val, images, options, max_pixels)
    return images, against, notes + note


def _fetching(options: Options) -> Fetching:
    return Fetching(options.cache_gb, options.cache_dir, options.retry_seconds)


def _decide_fetching(images: Manifest, recipe: Recipe) -> list[str]:
    """Whole shards where a run soon wants all their images, else ranges; raises UsageError if a window has no room."""
    source = images.source
    if not isinstance(source, RemoteShards):
        return []
    sizes = sorted((shard.bytes for shard in source.known.values()), reverse=True)
    room = _room(source)
    window = sum(sizes[: recipe.window_shards])
    if recipe.order == "windows" and window > room:
        raise UsageError(
            f"--cache-gb {room / 1e9:g} does not hold a window of {recipe.window_shards} shards ({window / 1e9:.3g} "
            f"GB): give more, best twice as much, or fewer --window-shards"
        )
    source.whole = recipe.order == "windows" or _fits(source)
    how = f"whole, kept in {source.cache.folder}" if source.cache and source.whole else "image by image"
    return [f"{len(sizes)} shards of {sum(sizes) / 1e9:.3g} GB in {source.root}: fetched {how}"]


def _room(source: RemoteShards) -> int:
    return source.cache.limit if source.cache else 0


def _fits(source: RemoteShards) -> bool:
    return sum(shard.bytes for shard in source.known.values()) <= _room(source)


def _after_move(images: Manifest) -> list[str]:
    """Lines about a run's images that are elsewhere now; raises DataError if they are not there, or are others."""
    reason = images.absence()
    if reason:
        raise DataError(f"{reason}: {BRING_BACK}")
    other = images.others()
    if other and images.root_before != images.root:
        raise DataError(f"{other} is not the image that the run was started with: give the --data that holds those")
    if other:
        return [f"warning: {other} has changed since the run was started"]
    if images.root_before in ("", images.root):
        return []
    count = len(images.fingerprints[0])
    return [f"the images are in {images.root} now, before in {images.root_before}: {count} of them are the same"]


def _validation(
    val: Path | str | None, images: Manifest, options: Options, max_pixels: int
) -> tuple[Manifest | None, list[str]]:
    """Images for kNN, or None and the reason in a line: what only watches a run never stops it."""
    if not options.knn:
        return None, []
    if isinstance(images, ShardManifest):
        return None, [f"no kNN evaluation: {len(images)} images are too many to vote; see evaluate knn --data"]
    if val is None or images.labels is None:
        why = "no val/ folder beside train/, nor --val" if val is None else f"no classes in {images.root}"
        return None, [f"no kNN evaluation: {why}"]
    try:
        against = manifest.scan(val, classes=images.classes, max_pixels=max_pixels, fetching=_fetching(options))
    except DataError as error:
        return None, [f"warning: no kNN evaluation: {error}"]
    if isinstance(against.source, RemoteShards):
        against.source.whole = _fits(against.source)
    return (None, [f"no kNN evaluation: no classes in {val}"]) if against.labels is None else (against, [])


def _queue_notes(original: Recipe, final: Recipe, images: int) -> list[str]:
    keys = final.check_queue() if final.dictionary != "batch" else 0
    if final.dictionary != "queue":
        whole = f"the bank's {images} entries, one for each image, are all negatives: there are no more to draw"
        return [whole] if keys == images and original.queue_size != keys else []
    if original.queue_size != "auto":
        share = "more keys than there are images" if keys > images else "more than a quarter of the images"
        if 4 * keys <= images:
            return []
        return [
            f"warning: --queue-size {keys} is {share} ({images}): the queue holds other keys of the query's own image; "
            f"--queue-size auto suits the set"
        ]
    many = 4 * keys > images
    remedy = ", more than a quarter of them: a smaller --batch-size makes the queue smaller" if many else ""
    return [f"queue_size auto: {keys} keys for {images} images{remedy}"]


def _settings_notes(recipe: Recipe, images: Manifest, parallel: Parallel) -> list[str]:
    """Warnings of settings that are allowed, and seldom meant."""
    notes = []
    if recipe.precision == "fp16" and parallel.device.type == "cpu":
        notes.append("warning: a CPU computes fp16 many times slower than fp32: use --precision fp32")
    if recipe.crop_size < LEAST_CROP:
        notes.append(f"warning: views of {recipe.crop_size} pixels show next to nothing: give a larger --crop-size")
    low = recipe.augmentation.crop_scale[0]
    count = len(images.sizes)
    some = np.linspace(0, count - 1, min(LOOKED_AT, count)).astype(np.int64)
    side = float(np.median(images.sizes[some].min(1)))
    if low**0.5 * side < LEAST_SEEN:
        notes.append(
            f"warning: the smallest crops, {low:.0%} of images whose shorter side is {side:g} pixels, show "
            f"{low**0.5 * side:.0f} pixels: raise the first number of --crop-scale"
        )
    if recipe.crop_size > MOST_ENLARGED * side:
        notes.append(
            f"warning: views of {recipe.crop_size} pixels enlarge images whose shorter side is {side:g}: a --crop-size "
            f"of {max(LEAST_CROP, round(side))} costs less and shows as much"
        )
    if recipe.optimizer == "sgd" and recipe.base_lr > LARGE_RATE:
        notes.append(f"warning: a learning rate of {recipe.base_lr:g} is far above what SGD bears: give a smaller --lr")
    return notes
