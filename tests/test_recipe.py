"""Recipes: published figures, learning-rate tables, validation, and the way to plain data and back."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoco.cli import pretrain_settings
from fastmoco.presets import PRESETS
from fastmoco.recipe import PUBLISHED_IMAGES, UNUSED, Augmentation, Recipe, RecipeError

V1, V2, CIFAR = (PRESETS[name][1] for name in ("v1", "v2", "cifar"))
STEPS_PER_EPOCH = 1_281_167 // 256


def test_an_epoch_of_imagenet_is_5004_steps() -> None:
    assert STEPS_PER_EPOCH == 5004


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 0.0003), (199, 0.0003)]
)
def test_v1_divides_the_rate_at_120_and_160(epoch: int, rate: float) -> None:
    for step in (0, STEPS_PER_EPOCH - 1):
        assert V1.learning_rate(epoch * STEPS_PER_EPOCH + step, STEPS_PER_EPOCH) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.03), (100, 0.015), (199, 1.85e-6)])
def test_v2_follows_a_cosine_in_whole_epochs(epoch: int, rate: float) -> None:
    for step in (0, STEPS_PER_EPOCH - 1):
        assert V2.learning_rate(epoch * STEPS_PER_EPOCH + step, STEPS_PER_EPOCH) == pytest.approx(rate, rel=1e-3)


def test_v2_at_every_epoch() -> None:
    for epoch in range(200):
        expected = 0.03 * (1 + math.cos(math.pi * epoch / 200)) / 2
        assert V2.learning_rate(epoch * STEPS_PER_EPOCH, STEPS_PER_EPOCH) == pytest.approx(expected, rel=1e-12)


def test_the_cifar_notebook_counts_epochs_from_one() -> None:
    assert CIFAR.base_lr == 0.06
    assert CIFAR.learning_rate(0, 97) == pytest.approx(0.059996, abs=1e-6)
    assert CIFAR.learning_rate(199 * 97, 97) == pytest.approx(0, abs=1e-12)


def test_a_cosine_per_step_passes_through_that_per_epoch() -> None:
    smooth = dataclasses.replace(V2, schedule_per="step")
    assert smooth.learning_rate(50 * 10, 10) == pytest.approx(V2.learning_rate(50 * 10, 10))
    rates = [smooth.learning_rate(step, 10) for step in range(2000)]
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_warm_up_rises_by_equal_steps_to_the_base_rate() -> None:
    warm = dataclasses.replace(V1, warmup_epochs=2.0)
    rates = [warm.learning_rate(step, 10) for step in range(21)]
    assert rates[:20] == pytest.approx([0.03 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == 0.03


@pytest.mark.parametrize(("batch", "rate"), [(256, 0.03), (128, 0.015), (64, 0.0075), (4096, 0.48)])
def test_auto_scales_the_rate_with_the_batch(batch: int, rate: float) -> None:
    assert dataclasses.replace(V1, batch_size=batch).base_lr == pytest.approx(rate, rel=1e-12)
    assert dataclasses.replace(V1, batch_size=batch, lr=0.1).base_lr == 0.1


@pytest.mark.parametrize(
    ("images", "batch", "keys"),
    [(1_281_167, 256, 65536), (5_000_000, 256, 65536), (50_000, 512, 2560), (20_000, 128, 1024), (312, 64, 256)],
)
def test_an_auto_queue_is_the_published_share_of_the_images(images: int, batch: int, keys: int) -> None:
    auto = dataclasses.replace(V2, queue_size="auto", batch_size=batch)
    settled = auto.for_images(images)
    assert settled == dataclasses.replace(auto, queue_size=keys, order=settled.order)


@settings(max_examples=300, deadline=None)
@given(images=st.integers(1, 10**7), groups=st.integers(1, 300), symmetric=st.booleans())
def test_an_auto_queue_is_whole_batches_and_neither_short_nor_near_the_set(
    images: int, groups: int, symmetric: bool
) -> None:
    recipe = Recipe(queue_size="auto", batch_size=32 * groups, symmetric=symmetric).for_images(images)
    keys, batch = recipe.check_queue(), recipe.batch_size * recipe.views
    assert keys % batch == 0 and 4 * batch <= keys <= max(65536, 4 * batch)
    if images >= 16 * batch:
        assert keys <= images / 4
    if images / 19 + batch <= 65536:
        assert keys >= images / 20


def test_an_auto_order_is_settled_by_the_images_and_one_that_was_given_stays() -> None:
    for images, order in ((1, "table"), (PUBLISHED_IMAGES, "table"), (1 << 21, "table"), ((1 << 21) + 1, "keyed")):
        assert V2.for_images(images).order == V2.order_of(images) == order
    for order in ("table", "keyed", "windows"):
        assert dataclasses.replace(V2, order=order).for_images(10**9).order == order
    with pytest.raises(RecipeError, match="order is 'any': use one of auto, table, keyed, windows"):
        dataclasses.replace(V2, order="any")
    with pytest.raises(RecipeError, match="window_shards is 0: use a whole number"):
        dataclasses.replace(V2, window_shards=0)


def test_a_number_of_keys_stays_and_auto_must_meet_data_first() -> None:
    recipe_ = dataclasses.replace(V2, queue_size=100)
    assert recipe_.for_images(7) == dataclasses.replace(recipe_, order="table") and recipe_.check_queue() == 100
    auto = dataclasses.replace(V2, queue_size="auto")
    assert Recipe.from_dict(json.loads(json.dumps(auto.as_dict()))) == auto
    with pytest.raises(RecipeError, match="queue_size is 'auto': .* recipe.for_images"):
        auto.check_queue()
    with pytest.raises(RecipeError, match="queue_size is 'many': use"):
        Recipe(queue_size="many")


def test_published_figures() -> None:
    assert (V1.arch, V1.head, V1.temperature, V1.dim, V1.queue_size) == ("resnet50", "linear", 0.07, 128, 65536)
    assert (V1.ema_momentum, V1.sgd_momentum, V1.weight_decay, V1.batch_size) == (0.999, 0.9, 1e-4, 256)
    assert (V1.bn_group, V1.epochs, V1.crop_size, V1.shuffle_bn) == (32, 200, 224, True)
    assert (V2.head, V2.temperature, V2.schedule, V2.schedule_per) == ("mlp", 0.2, "cosine", "epoch")
    assert (CIFAR.arch, CIFAR.stem, CIFAR.batch_size, CIFAR.bn_group) == ("resnet18", "cifar", 512, 64)
    assert (CIFAR.temperature, CIFAR.ema_momentum, CIFAR.queue_size, CIFAR.weight_decay) == (0.1, 0.99, 4096, 5e-4)


def test_published_augmentation() -> None:
    for recipe in (V1, V2):
        assert recipe.augmentation.crop_scale == (0.2, 1.0)
        assert (recipe.augmentation.gray_p, recipe.augmentation.flip_p) == (0.2, 0.5)
    assert (V1.augmentation.hue, V1.augmentation.jitter_p, V1.augmentation.gray_first) == (0.4, 1.0, True)
    assert V1.augmentation.blur_p == CIFAR.augmentation.blur_p == 0
    assert (V2.augmentation.hue, V2.augmentation.jitter_p, V2.augmentation.gray_first) == (0.1, 0.8, False)
    assert (V2.augmentation.blur_p, V2.augmentation.blur_sigma) == (0.5, (0.1, 2.0))
    assert CIFAR.augmentation.crop_scale == (0.08, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_data_and_back(preset: str) -> None:
    recipe = PRESETS[preset][1]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_unknown_fields_are_named() -> None:
    with pytest.raises(RecipeError, match="colour"):
        Recipe.from_dict(Recipe().as_dict() | {"colour": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 0), ("queue_size", 0), ("arch", "vgg"), ("width", 0.0), ("ema_momentum", 1.1), ("sgd_momentum", 1.0)]
    + [("temperature", 0.0), ("lr", -1.0), ("weight_decay", -1e-9), ("seed", -1), ("warmup_epochs", -1.0)]
    + [("optimizer", "adam"), ("lars_eta", 0.0)],
)
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"{field} is {value!r}: use"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("hue", 0.6), ("gray_p", 1.5), ("brightness", -0.1), ("crop_scale", (0.5, 0.2)), ("blur_sigma", (0.1, 9.0))]
    + [("std", (0.2, 0.0, 0.2)), ("crop_ratio", (0.0, 1.0))],
)
def test_bad_augmentation_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=field):
        Augmentation(**{field: value})


def test_a_batch_that_does_not_split_names_those_that_do() -> None:
    with pytest.raises(RecipeError, match="use --batch-size 96 or 128"):
        Recipe(batch_size=100)
    with pytest.raises(RecipeError, match="3 ranks in .* use --batch-size 192 or 288"):
        Recipe(batch_size=256).check_ranks(3)
    assert Recipe(batch_size=256).check_ranks(8) == 32


@settings(max_examples=200, deadline=None)
@given(batch=st.integers(-5, 600), group=st.integers(-1, 70), queue=st.integers(-1, 5), temperature=st.floats(-1, 1))
def test_a_recipe_is_either_whole_or_refused_with_a_remedy(
    batch: int, group: int, queue: int, temperature: float
) -> None:
    try:
        recipe = Recipe(batch_size=batch, bn_group=group, queue_size=queue, temperature=temperature)
    except RecipeError as error:
        assert "use " in str(error)
    else:
        assert recipe.batch_size % max(1, recipe.bn_group) == 0 and recipe.queue_size > 0 and recipe.temperature > 0


# Dictionaries


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"dictionary": "stack"}, "dictionary is 'stack': use one of queue, batch, bank"),
        ({"dictionary": "batch", "queue_size": 100}, "queue_size is 100: leave it out, since a batch does not use it"),
        ({"dictionary": "batch", "ema_momentum": 0.9}, "ema_momentum is 0.9: leave it out"),
        ({"dictionary": "bank", "symmetric": True}, "symmetric is True: leave it out, since a bank"),
        ({"bank_momentum": 0.9}, "bank_momentum is 0.9: leave it out, since a queue"),
        ({"dictionary": "batch", "same_view_negatives": True}, "without symmetric: both views need a loss"),
        ({"dictionary": "bank", "bank_momentum": 1.0}, "bank_momentum is 1.0: use a number from 0 to below 1"),
        ({"dictionary": "bank", "batch_size": 1, "bn_group": 0}, "batch_size 1 has nothing"),
    ],
)
def test_a_dictionary_refuses_what_it_does_not_use(fields: dict, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("preset", "candidates", "queries", "views"),
    [
        ("v1", 65537, 256, 1),
        ("simclr", 8191, 8192, 2),
        ("simclr-cifar", 1023, 1024, 2),
        ("end-to-end", 1024, 1024, 2),
        ("bank", 65537, 256, 1),
    ],
)
def test_what_a_query_is_told_apart_from(preset: str, candidates: int, queries: int, views: int) -> None:
    recipe = PRESETS[preset][1]
    assert (recipe.candidates, recipe.queries, recipe.forward_views) == (candidates, queries, views)


# SimCLR's rates


def published_rate(step: int, steps_per_epoch: int, epochs: int, warmup: int, peak: float) -> float:
    """google-research/simclr, model_util.learning_rate_schedule: linear from 0, then Keras' CosineDecay."""
    warm, total = warmup * steps_per_epoch, epochs * steps_per_epoch
    if step < warm:
        return step / warm * peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def test_simclrs_rate_is_the_published_one() -> None:
    recipe = PRESETS["simclr"][1]
    assert recipe.base_lr == pytest.approx(4.8) == 0.3 * 4096 / 256
    for step in range(0, 100 * 312, 7):
        assert recipe.learning_rate(step, 312) == pytest.approx(published_rate(step, 312, 100, 10, 4.8), abs=1e-12)
    rates = [recipe.learning_rate(step, 312) for step in (0, 3120, 3120 + 14040, 31199)]
    assert rates == pytest.approx([0, 4.8, 2.4, 4.8 * math.sin(math.pi / 2 / 28080) ** 2])


def test_counted_from_the_start_the_cosine_jumps_at_the_end_of_the_warm_up() -> None:
    """The control: what `schedule_from` is there for."""
    recipe = dataclasses.replace(PRESETS["simclr"][1], schedule_from="start")
    assert recipe.learning_rate(3119, 312) == pytest.approx(4.8)
    assert recipe.learning_rate(3120, 312) == pytest.approx(0.976 * 4.8, rel=1e-3)


def test_the_rate_scales_with_the_batch_or_its_root() -> None:
    for batch in (256, 1024, 4096):
        rate = dataclasses.replace(PRESETS["simclr"][1], batch_size=batch).base_lr
        assert rate == pytest.approx(0.075 * math.sqrt(batch))
        assert Recipe(batch_size=batch).base_lr == pytest.approx(0.03 * batch / 256)
    assert PRESETS["simclr-cifar"][1].base_lr == pytest.approx(2.0)
    assert PRESETS["end-to-end"][1].base_lr == pytest.approx(0.12)


def test_recipes_need_no_torch() -> None:
    code = "import fastmoco.recipe, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


@pytest.mark.parametrize("dictionary", ["queue", "batch", "bank"])
@pytest.mark.parametrize("preset", PRESETS)
def test_any_preset_takes_any_dictionary(preset: str, dictionary: str) -> None:
    """What it said of another one goes; a recipe keeps all else."""
    recipe = PRESETS[preset][1]
    other = recipe.with_dictionary(dictionary)
    assert other.dictionary == dictionary
    assert set(other.differences(recipe)) <= {"dictionary", *UNUSED[dictionary]}
    assert recipe.with_dictionary(recipe.dictionary) == recipe


@pytest.mark.parametrize(
    "words", [["--dictionary", "bank"], ["--dictionary=bank"], ["--dictionary=batch", "--dictionary=bank"]]
)
def test_a_command_with_another_dictionary_needs_no_word_on_the_presets_own(words: list[str]) -> None:
    """Unlike one that asks for what the dictionary has no use for."""
    assert pretrain_settings("demo", words).recipe == PRESETS["demo"][1].with_dictionary("bank")
    with pytest.raises(RecipeError, match="since a bank does not use it"):
        pretrain_settings("demo", [*words, "--ema-momentum", "0.5"])
