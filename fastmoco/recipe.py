"""Recipes: everything that decides the result of a run, as frozen data.

A run is a pure function of (recipe, seed, step). So every field that changes what is learnt stands here, and also the
few that decide how a run is judged (HARMLESS_ON_RESUME). Where a run reads and writes, and how many threads it uses,
stands in `options.py`; the recipes that have names stand in `presets.py`. Only the standard library is imported, so
that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
REFERENCE_BATCH = 256
MOST_PIXELS = 178_956_970  # of more Pillow reads no header
PUBLISHED_KEYS, PUBLISHED_IMAGES = 65536, 1_281_167  # the queue and the set it was published with
# Resuming may change these: they decide how a run is judged and when it gives up, not what it learns.
HARMLESS_ON_RESUME = ("knn_k", "knn_temperature", "knn_features", "max_bad_share")
BACKGROUNDS = {"white": "#ffffff", "black": "#000000", "gray": "#808080"}
COLOUR = re.compile("#[0-9a-fA-F]{6}")
# What runs did that were started before these fields were there.
BEFORE_THERE_WERE_FIELDS = {"background": "ignore", "value_range": "container", "order": "table"}
ORDERS = ("auto", "table", "keyed", "windows")
TABLE_UP_TO = 1 << 21  # images that auto sorts: a quarter of a second and 50 MB an epoch
# Of a run whose length follows the data: half an hour of two cores, for the preset small.
SMALL_PAIRS, SMALL_EPOCHS = 900_000, (20, 400)
LEAST_BATCHES = 4  # in a queue that follows the data: with fewer, all negatives are of the newest encoders


# Fields that a dictionary has no use for: they must keep their defaults, or a run would not be what it seems.
UNUSED = {
    "queue": ("same_view_negatives", "bank_momentum"),
    "batch": ("queue_size", "queue_dtype", "ema_momentum", "bank_momentum"),
    "bank": ("symmetric", "same_view_negatives", "ema_momentum"),
}


class RecipeError(ValueError):
    """A field holds a value that cannot work; the message names the field, the value and the remedy."""


@dataclass(frozen=True)
class Augmentation:
    """Distribution of the views: one row of a table, applied alike to query and key views.

    Order of the operations: crop, grey if `gray_first`, colour jitter, grey otherwise, blur, flip, normalise.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area (torchvision's RandomResizedCrop)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, drawn log-uniformly."""
    brightness: float = 0.4
    """Jitter factor drawn from [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Jitter factor drawn from [1 - c, 1 + c]."""
    saturation: float = 0.4
    """Jitter factor drawn from [1 - s, 1 + s]."""
    hue: float = 0.1
    """Hue shift drawn from [-h, h], in turns of the colour circle; at most 0.5."""
    jitter_p: float = 0.8
    """Probability that the four jitters are applied, in a drawn order."""
    gray_p: float = 0.2
    """Probability of conversion to grey."""
    gray_first: bool = False
    """Whether grey comes before the jitter (MoCo v1) or after it (MoCo v2)."""
    blur_p: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the crop."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each RGB channel, subtracted from values in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each RGB channel, divided by."""

    def __post_init__(self) -> None:
        for name in ("jitter_p", "gray_p", "blur_p", "flip_p"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "use a probability from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "use a strength from 0 to 1")
        _require(0 <= self.hue <= 0.5, "hue", self.hue, "use a shift from 0 to 0.5 turns")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "use two shares with 0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, "crop_ratio", self.crop_ratio, "use two ratios with 0 < low <= high")
        low, high = self.blur_sigma
        _require(0 <= low <= high <= 4, "blur_sigma", self.blur_sigma, "use two deviations with 0 <= low <= high <= 4")
        _require(min(self.std) > 0, "std", self.std, "use positive deviations")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run."""

    arch: Literal[ARCHITECTURES] = "resnet50"  # type: ignore[valid-type]
    """Encoder, with torchvision's names and numerics (v1.5 strides)."""
    width: float = 1.0
    """Multiplier of every channel count of the encoder."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """7x7 convolution of stride 2 and max-pooling, or a 3x3 convolution of stride 1 without pooling."""
    zero_init: bool = False
    """Start the last batch norm of every block at scale 0, so that blocks begin as the identity."""
    head: Literal["linear", "mlp", "mlp-bn"] = "linear"
    """Projection head: one linear layer (v1), two with a ReLU between them (v2), or those with batch norm (SimCLR)."""
    dim: int = 128
    """Dimensions of the projection: the length of queries and keys."""

    dictionary: Literal["queue", "batch", "bank"] = "queue"
    """Where negatives come from: a queue of keys of past batches (MoCo), the batch itself (SimCLR, end-to-end), or a
    memory bank with one entry for each image."""
    queue_size: int | Literal["auto"] = 65536
    """K, the number of negative keys: kept in a queue, or drawn from a bank for each batch. Any number: writing wraps
    around. auto follows the number of images."""
    queue_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Storage of the queue; auto follows the precision."""
    ema_momentum: float = 0.999
    """m of the key encoder's update k <- m k + (1 - m) q."""
    temperature: float = 0.07
    """Temperature T of InfoNCE."""
    symmetric: bool = False
    """Use each view once as query and once as key: add the two losses; of a batch, take the mean over both views."""
    same_view_negatives: bool = False
    """Of a batch: tell a view from all other images' both views (NT-Xent), not from their other views alone."""
    bank_momentum: float = 0.5
    """m of a bank's entry <- normalise(m entry + (1 - m) query)."""
    bn_group: int = 32
    """Samples that share batch-norm statistics, whatever the number of ranks; 0: all rows of a forward on all ranks."""
    shuffle_bn: bool = True
    """Permute the keys over the batch-norm groups. Without it batch norm leaks which pairs belong together."""

    batch_size: int = 256
    """Global batch, over all ranks."""
    epochs: int = 200
    """Length of the run; the schedule is stretched over it. 0 follows the number of images: 900,000 pairs of views in
    all, but from 20 to 400 epochs."""
    lr: float | Literal["auto"] = "auto"
    """Learning rate at its peak; auto is reference_lr, scaled to the batch."""
    reference_lr: float = 0.03
    """Learning rate of a batch of 256."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How auto scales the rate: by batch size / 256, or by its square root."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step divides the rate by ten at each milestone; cosine ends at zero."""
    schedule_per: Literal["epoch", "step"] = "epoch"
    """Whether the cosine is evaluated once an epoch (as published) or at every step."""
    schedule_first_epoch: int = 0
    """Number that the schedule gives to the first epoch (1 in the CIFAR-10 notebook)."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which the step schedule divides the rate by ten."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly from zero, at every step."""
    schedule_from: Literal["start", "warmup"] = "start"
    """Where the cosine begins: at the run's start, or at the end of the warm-up, whose first step then has rate 0."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """sgd as published, or lars for batches of thousands: it wants a much larger lr, which auto does not give."""
    lars_eta: float = 0.001
    """Trust of LARS: a layer's step is about lr x eta of the length of its weights."""
    lars_momentum: Literal["after", "inside"] = "after"
    """Form of LARS: the rate multiplies the velocity, as in moco-v3, or goes into it, as in SimCLR."""
    sgd_momentum: float = 0.9
    """Momentum of SGD (not Nesterov's)."""
    weight_decay: float = 1e-4
    """Weight decay on every parameter, batch norm and biases included; with lars not on those two."""

    order: Literal[ORDERS] = "auto"  # type: ignore[valid-type]
    """Order of the images in an epoch: table sorts a random number of each; keyed computes a permutation without a
    table; windows takes tar shards in a random order, and mixes the images of window_shards of them. auto is table up
    to 2,097,152 images, and keyed for more."""
    window_shards: int = 16
    """Shards whose images are mixed at a time, where the order is windows."""
    crop_size: int = 224
    """Side of the square views, in pixels."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Distribution of the views."""
    background: str = "white"
    """Colour that transparent images are shown over: white, black, gray or #rrggbb; ignore shows what lies under
    transparency, whatever it is."""
    value_range: tuple[float, float] | Literal["header", "container"] = "header"
    """Numbers in the image files that are black and white: two numbers, or what the header states, which is what the
    type can hold but for PGM and PPM; container takes the type for those, too. JPEG and WebP are always 0 to 255."""
    fancy_upsampling: bool = False
    """Interpolate the colours of JPEGs on a GPU as a CPU always does: slower, for comparing the two."""
    max_pixels: int = 100_000_000
    """Images of more pixels are left out: decoded, one takes three bytes a pixel."""
    max_bad_share: float = 0.001
    """Share of the images that may turn out to be bad while a run reads them, at least one; at more it stops."""
    seed: int = 0
    """The one seed: of initialisation, sample order, boxes, photometric draws and shuffles."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Numbers of the encoders; auto is bf16 on a GPU or CPU that has it, fp16 on an older GPU, fp32 on another CPU."""

    knn_k: int = 200
    """Neighbours of the kNN evaluation."""
    knn_temperature: float = 0.1
    """Temperature of the neighbours' votes exp(similarity / T)."""
    knn_features: Literal["backbone", "projection"] = "backbone"
    """Features that kNN compares: before or after the projection head."""

    def __post_init__(self) -> None:
        for name in ("dim", "queue_size", "batch_size", "epochs", "window_shards", "crop_size", "knn_k"):
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1 or (name, value) in (("queue_size", "auto"), ("epochs", 0))
            _require(whole, name, value, "use a whole number of at least 1")
        group = self.bn_group
        _require(isinstance(group, int) and group >= 0, "bn_group", group, "use a whole number of at least 0")
        _require(self.arch in ARCHITECTURES, "arch", self.arch, f"use one of {', '.join(ARCHITECTURES)}")
        _require(self.order in ORDERS, "order", self.order, f"use one of {', '.join(ORDERS)}")
        _require(self.width > 0, "width", self.width, "use a positive multiplier")
        _require(0 <= self.ema_momentum <= 1, "ema_momentum", self.ema_momentum, "use a number from 0 to 1")
        _require(self.optimizer in ("sgd", "lars"), "optimizer", self.optimizer, "use sgd or lars")
        _require(self.lars_eta > 0, "lars_eta", self.lars_eta, "use a positive number")
        _require(0 <= self.sgd_momentum < 1, "sgd_momentum", self.sgd_momentum, "use a number from 0 to below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "use a number of at least 0")
        _require(self.temperature > 0, "temperature", self.temperature, "use a positive temperature")
        _require(self.knn_temperature > 0, "knn_temperature", self.knn_temperature, "use a positive temperature")
        _require(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "use a number of at least 0")
        remedy = f"use a whole number from 1 to {MOST_PIXELS}"
        _require(1 <= self.max_pixels <= MOST_PIXELS, "max_pixels", self.max_pixels, remedy)
        _require(0 <= self.max_bad_share <= 1, "max_bad_share", self.max_bad_share, "use a share from 0 to 1")
        remedy = "use white, black, gray, ignore or a colour such as #7f7f7f"
        is_name = self.background in (*BACKGROUNDS, "ignore")
        _require(is_name or COLOUR.fullmatch(self.background) is not None, "background", self.background, remedy)
        span = self.value_range
        ordered = len(span) == 2 and -math.inf < span[0] < span[1] < math.inf if isinstance(span, tuple) else True
        _require(ordered, "value_range", span, "use two numbers, the smaller one first, or header")
        _require(self.lr == "auto" or self.lr > 0, "lr", self.lr, "use auto or a positive rate")
        _require(self.reference_lr > 0, "reference_lr", self.reference_lr, "use a positive rate")
        _require(0 <= self.bank_momentum < 1, "bank_momentum", self.bank_momentum, "use a number from 0 to below 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to 2^63 - 1")
        self._check_dictionary()
        self.check_ranks(1)

    def _check_dictionary(self) -> None:
        kinds = ("queue", "batch", "bank")
        _require(self.dictionary in kinds, "dictionary", self.dictionary, f"use one of {', '.join(kinds)}")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for name in UNUSED[self.dictionary]:
            value = getattr(self, name)
            remedy = f"leave it out, since a {self.dictionary} does not use it, or use another --dictionary"
            _require(value == fields[name], name, value, remedy)
        if self.same_view_negatives and not self.symmetric:
            raise RecipeError("same_view_negatives is True without symmetric: both views need a loss; add --symmetric")

    def check_ranks(self, world: int) -> int:
        """Samples per rank for `world` ranks; raises RecipeError if the batch does not split into whole groups."""
        unit = world * max(1, self.bn_group)
        if self.batch_size % unit:
            below, above = self.batch_size // unit * unit, -(-self.batch_size // unit) * unit
            near = " or ".join(str(n) for n in (below, above) if n)
            ranks = f"{world} ranks in " if world > 1 else ""
            raise RecipeError(
                f"batch_size {self.batch_size} does not split over {ranks}batch-norm groups of bn_group "
                f"{self.bn_group}: use --batch-size {near}, or another --bn-group (a divisor of the batch of a rank)"
            )
        if self.bn_group == 0 and self.batch_size * self.forward_views == 1:
            raise RecipeError("batch_size 1 has nothing to take batch-norm statistics over: use --batch-size 2 or more")
        return self.batch_size // world

    def for_images(self, count: int) -> Recipe:
        """The recipe with every number known that follows the number of images, `count`.

        A bank has no more entries than images, all of which are then its negatives.
        K, where it is auto, is the published share of the images (65,536 of 1,281,167, about n / 20), but at least 4
        batches and at most 65,536, in whole batches: then each batch of keys leaves as it came, together, and the
        published code, which takes no other K, can go on from an export. Epochs, where they are 0, are those of
        SMALL_PAIRS pairs of views, within SMALL_EPOCHS.
        """
        recipe = dataclasses.replace(self, order=self.order_of(count))
        if self.epochs == 0:
            fewest, most = SMALL_EPOCHS
            recipe = dataclasses.replace(recipe, epochs=min(max(-(-SMALL_PAIRS // count), fewest), most))
        keys = self._keys_for(count) if self.queue_size == "auto" else self.check_queue()
        return dataclasses.replace(recipe, queue_size=min(keys, count) if self.dictionary == "bank" else keys)

    def _keys_for(self, count: int) -> int:
        batch = self.batch_size * self.views
        share = -(-count * PUBLISHED_KEYS // (PUBLISHED_IMAGES * batch))
        return batch * max(LEAST_BATCHES, min(share, PUBLISHED_KEYS // batch))

    def order_of(self, count: int) -> str:
        """The order of `count` images: as given, or where it is auto by their number."""
        if self.order != "auto":
            return self.order
        return "table" if count <= TABLE_UP_TO else "keyed"

    def check_queue(self) -> int:
        """K; raises RecipeError if it is still auto."""
        remedy = "it follows the data, so give a number here, or take recipe.for_images(number of images)"
        _require(self.queue_size != "auto", "queue_size", self.queue_size, remedy)
        return int(self.queue_size)

    def with_dictionary(self, dictionary: str) -> Recipe:
        """The recipe with another dictionary; fields that it has no use for take their defaults."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        changes: dict[str, Any] = {name: fields[name] for name in UNUSED[dictionary]}
        return dataclasses.replace(self, **changes, dictionary=dictionary)  # type: ignore[arg-type]

    @property
    def base_lr(self) -> float:
        """Learning rate before the schedule: `lr`, or where it is auto `reference_lr`, scaled to the batch.

        Linear scaling after Goyal et al., 2017; the square root after SimCLR's appendix B.1.
        """
        if self.lr != "auto":
            return float(self.lr)
        times = self.batch_size / REFERENCE_BATCH
        return self.reference_lr * (math.sqrt(times) if self.lr_scaling == "sqrt" else times)

    @property
    def views(self) -> int:
        """Key views of a sample that are encoded and enqueued in each step: 2 for a queue when symmetric, else 1."""
        return 2 if self.symmetric and self.dictionary == "queue" else 1

    @property
    def forward_views(self) -> int:
        """Views of a sample in one forward of the query encoder."""
        return 2 if self.dictionary == "batch" else self.views

    @property
    def candidates(self) -> int:
        """Keys that a query is told apart among, the positive included."""
        if self.dictionary != "batch":
            return self.check_queue() + 1
        return 2 * self.batch_size - 1 if self.same_view_negatives else self.batch_size

    @property
    def queries(self) -> int:
        """Rows of the loss in each step, over all ranks."""
        return self.batch_size * (2 if self.symmetric else 1)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of `step`, counted from 0 over the whole run."""
        time = step / steps_per_epoch
        after = self.schedule_from == "warmup"
        if time < self.warmup_epochs:
            return self.base_lr * (step if after else step + 1) / (self.warmup_epochs * steps_per_epoch)
        epoch = time + self.schedule_first_epoch
        if self.schedule_per == "epoch":
            epoch = step // steps_per_epoch + self.schedule_first_epoch
        if self.schedule == "cosine":
            warm_up = self.warmup_epochs if after else 0.0
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / (self.epochs - warm_up)))
        if self.schedule == "step":
            return self.base_lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return self.base_lr

    def as_dict(self) -> dict:
        """The recipe as plain JSON-ready data; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Fields in which two recipes differ, each with this one's value and the other's."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        return {name: (mine, theirs) for name, (mine, theirs) in pairs.items() if mine != theirs}

    @classmethod
    def from_dict(cls, data: dict) -> Recipe:
        """Recipe from `as_dict`'s data; RecipeError on a field that no recipe has.

        Data from before a field existed keeps the meaning that it had then.
        """
        values: dict[str, Any] = BEFORE_THERE_WERE_FIELDS | dict(data)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        remedy = "this version knows no such fields: remove them, or use the version that wrote them"
        _require(not unknown, "recipe", unknown, remedy)
        if isinstance(values.get("augmentation"), dict):
            values["augmentation"] = Augmentation(**_tuples(values["augmentation"]))
        return cls(**_tuples(values))


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise RecipeError(f"{name} is {value!r}: {remedy}")


def _tuples(values: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
