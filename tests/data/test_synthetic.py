"""The embedded image set: the same bytes again, whole or not there, varied, and hard for raw pixels."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.random import RandomState
from PIL import Image

from fastmoco.data import synthetic

Pixels = dict[str, np.ndarray]
CHANCE = 1 / len(synthetic.FAMILIES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make(tmp_path_factory.mktemp("synthetic") / "images")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 3, "val": 1})


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.jpg"))


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_two_makes_are_equal_byte_for_byte(few: None, tmp_path: Path) -> None:
    assert _digest(synthetic.make(tmp_path / "a")) == _digest(synthetic.make(tmp_path / "b"))


def test_another_seed_gives_other_bytes(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = synthetic.make(tmp_path / "a")
    monkeypatch.setattr(synthetic, "SEED", synthetic.SEED + 1)
    assert _digest(result) != _digest(synthetic.make(tmp_path / "b"))


def test_an_image_depends_on_nothing_but_its_name(whole: Path, few: None, tmp_path: Path) -> None:
    for path in _files(synthetic.make(tmp_path / "few")):
        assert path.read_bytes() == (whole / path.relative_to(tmp_path / "few")).read_bytes()


def test_classes_are_balanced_and_named_alike_in_both_splits(whole: Path) -> None:
    counts = Counter((path.parts[-3], path.parts[-2]) for path in _files(whole))
    target = {(split, family): n for split, n in synthetic.IMAGES.items() for family in synthetic.FAMILIES}
    assert counts == target


def test_no_image_comes_twice(whole: Path) -> None:
    files = _files(whole)
    assert len({path.read_bytes() for path in files}) == len(files)


def test_every_file_decodes_and_the_set_is_as_mixed_as_a_real_folder(whole: Path) -> None:
    sizes, modes, progressive, tables = set(), Counter(), Counter(), set()
    for path in _files(whole):
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG"
            sizes.add(image.size)
            modes[image.mode] += 1
            progressive["progression" in image.info] += 1
            tables.add(tuple(image.quantization[0]))
    sides = np.array(sorted(sizes))
    low, high = synthetic.SIDES
    assert sides.min() >= low and sides.max() <= high and np.ptp(sides) > 0.9 * (high - low)
    assert len(sizes) > 500 and len(tables) > 30
    assert 0.05 < modes["L"] / modes.total() < 0.15 and set(modes) == {"L", "RGB"}
    assert 0.10 < progressive[True] / progressive.total() < 0.20


def test_a_current_set_is_left_alone(few: None, tmp_path: Path) -> None:
    folder = synthetic.make(tmp_path / "a")
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in _files(folder)]
    synthetic.make(folder)
    assert before == [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in _files(folder)]


def test_a_changed_generator_makes_the_set_again(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = synthetic.make(tmp_path / "a")
    stale = folder / "train" / "dots" / "of_the_last_version.jpg"
    stale.write_bytes(_files(folder)[0].read_bytes())
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert synthetic.make(folder) == folder and not stale.exists()
    assert os.listdir(tmp_path) == ["a"]


def test_a_set_that_lost_a_file_is_made_again(few: None, tmp_path: Path) -> None:
    folder = synthetic.make(tmp_path / "a")
    lost = folder / "val" / "rings" / "rings_0000.jpg"
    lost.unlink()
    synthetic.make(folder)
    assert lost.exists()


def test_stopped_half_way_nothing_is_there_and_the_next_call_makes_all(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = synthetic._save, []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 10:
            raise OSError("disk full")
        whole(*arguments)

    monkeypatch.setattr(synthetic, "_save", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.make(tmp_path / "a")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 2, "val": 1})
    assert len(_files(synthetic.make(tmp_path / "a"))) == 30


def test_what_is_not_ours_is_never_touched(few: None, tmp_path: Path) -> None:
    theirs = tmp_path / "photos" / "cat.jpg"
    theirs.parent.mkdir()
    theirs.write_bytes(b"meow")
    with pytest.raises(ValueError, match="not an image set made by fastmoco"):
        synthetic.make(theirs.parent)
    with pytest.raises(ValueError, match="not an image set made by fastmoco"):
        synthetic.make(theirs)
    assert theirs.read_bytes() == b"meow"


def test_an_empty_folder_is_filled(few: None, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(_files(synthetic.make(tmp_path / "a"))) == 40


def test_several_callers_at_once_get_one_whole_set(few: None, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(synthetic.make, [tmp_path / "a"] * 4))
    assert folders == {tmp_path / "a"} and len(_files(tmp_path / "a")) == 40
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture(scope="module")
def pixels(whole: Path) -> Pixels:
    return {split: _pixels(whole / split, 32) for split in synthetic.IMAGES}


def _pixels(folder: Path, side: int) -> np.ndarray:
    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255

    return np.array([read(path) for path in sorted(folder.glob("*/*.jpg"))])


def _standard(images: np.ndarray) -> np.ndarray:
    return (images - images.mean((1, 2, 3), keepdims=True)) / images.std((1, 2, 3), keepdims=True)


def _classes(split: str) -> np.ndarray:
    return np.arange(len(synthetic.FAMILIES)).repeat(synthetic.IMAGES[split])


def _nearest(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    bank, queries = bank.reshape(len(bank), -1), queries.reshape(len(queries), -1)
    distance = (bank**2).sum(1) - 2 * queries @ bank.T
    votes = labels[np.argpartition(distance, k, axis=1)[:, :k]]
    return np.array([np.bincount(row).argmax() for row in votes])


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("standardise", [False, True])
def test_neighbours_in_pixel_space_do_not_tell_the_class(pixels: Pixels, k: int, standardise: bool) -> None:
    bank, queries = pixels["train"], pixels["val"]
    if standardise:  # brightness and contrast of each image taken out: kinder to pixels
        bank, queries = _standard(bank), _standard(queries)
    assert (_nearest(bank, _classes("train"), queries, k) == _classes("val")).mean() <= 0.5


def test_the_same_neighbours_find_what_pixels_do_tell(pixels: Pixels) -> None:
    # Negative control of the measure.
    bank, queries = pixels["train"], pixels["val"]
    threshold = np.median(bank.mean((1, 2, 3)))
    bright, truth = (x.mean((1, 2, 3)) > threshold for x in (bank, queries))
    assert (_nearest(bank, bright.astype(int), queries, 5) == truth).mean() > 0.9


def test_colour_does_not_tell_the_class(pixels: Pixels) -> None:
    bank, queries = pixels["train"].mean((1, 2)), pixels["val"].mean((1, 2))
    assert (_nearest(bank, _classes("train"), queries, 5) == _classes("val")).mean() < 2.5 * CHANCE


@pytest.mark.parametrize("family", synthetic.FAMILIES)
def test_a_family_varies_and_uses_both_tones(family: str) -> None:
    images = [synthetic.render(family, RandomState([7, i])) for i in range(6)]
    assert len({image.shape for image in images}) == 6
    assert all(image.dtype == np.uint8 and image.std() > 8 for image in images)
