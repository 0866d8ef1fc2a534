"""The loaders that are compared do the same work; and all of them, timed by pytest-benchmark (--benchmark-enable)."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.bench import loader
from fastmoco.bench.journal import Journal
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.pipeline import Decoding, cut
from fastmoco.presets import PRESETS

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=32, crop_size=40)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scan(loader.photographs(tmp_path_factory.mktemp("images"), 32), cache=False)


def test_the_images_are_like_photographs_in_size(images: Manifest) -> None:
    assert (images.sizes == loader.IMAGE_SIZE).all() and not images.rejected
    sizes = [Path(images.path(i)).stat().st_size for i in range(len(images))]
    assert 60_000 < np.mean(sizes) < 200_000  # ImageNet's mean is 110 KB


def test_ours_and_pillows_pairs_are_the_same_pictures(images: Manifest) -> None:
    """Two libraries resize within two grey levels of each other; another image differs by far more."""
    sources = loader.sources(RECIPE, images, CPU)
    with sources["fastmoco"]() as draw:
        batch = draw()
    ours = torch.stack([batch.query_crops, batch.key_crops], 1).float()
    with loader.pillow(RECIPE, images) as draw:
        theirs = torch.from_numpy(draw()).float()
    assert (ours - theirs).abs().mean() < 2
    assert (ours - theirs.roll(1, 0)).abs().mean() > 20


def test_dali_alone_gives_crops_and_decoded_images(images: Manifest) -> None:
    sources = loader.sources(RECIPE, images, CPU)
    with sources["DALI, file reader"]() as draw:
        assert [np.asarray(view[0]).shape for view in draw()] == [(40, 40, 3)] * 2
    with sources[loader.DECODE]() as draw:
        assert np.asarray(draw()[0][0]).shape == (375, 500, 3)


def test_finished_views_are_the_same_from_both_chains(images: Manifest) -> None:
    """DALI rounds its blur otherwise: a twentieth of a standard deviation on average; unfinished crops are far off."""
    sources = loader.sources(RECIPE, images, CPU)
    with sources[loader.KERNEL]() as draw, sources[loader.CHAIN]() as finished:
        (query, key), batch = draw(), finished()
    assert (query - batch.query_crops).abs().mean() < 0.05
    assert (key - batch.key_crops).abs().mean() < 0.05
    assert (query - batch.key_crops).abs().mean() > 0.3


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 0.0), ("cuda", 0.3)])
def test_a_gpu_is_warm_and_timed_for_long(monkeypatch: pytest.MonkeyPatch, device: str, seconds: float) -> None:
    """The control is the CPU, where a sample of a committed record is eight batches of 32 after three."""
    monkeypatch.setitem(loader.SECONDS, "cuda", seconds)
    monkeypatch.setattr(loader, "_wait", lambda _: clock_readings.append(0.0))
    clock_readings: list[float] = []

    @contextmanager
    def source() -> Iterator[Callable[[], None]]:
        yield lambda: clock_readings.append(time.sleep(0.005) or time.perf_counter())

    (sample,) = loader._samples(source, 32, torch.device(device), 1)
    warm, timed = clock_readings.index(0.0), clock_readings[clock_readings.index(0.0) + 1 : -1]
    assert (warm, len(timed)) == (3, 8) if device == "cpu" else warm == 10 and timed[-1] - timed[0] > 0.25
    assert 0 < sample.pairs_per_second < 32 / 0.005


@pytest.mark.parametrize(("device", "starts"), [("cpu", 3), ("cuda", 1)])
def test_a_provider_is_started_once_on_a_gpu_and_rows_are_kept_as_they_come(
    monkeypatch: pytest.MonkeyPatch, device: str, starts: int
) -> None:
    """A start takes seconds there, and the check for a GPU may end at any moment."""
    files, values = [], []

    @contextmanager
    def source(name: str) -> Iterator[Callable[[], None]]:
        files.append(name)
        if name == loader.PILLOW:
            raise OSError("no such library")
        yield lambda: time.sleep(1e-4)

    names = (loader.OURS, loader.PILLOW, loader.DECODE)
    monkeypatch.setattr(loader, "sources", lambda *_: {name: functools.partial(source, name) for name in names})
    monkeypatch.setattr(loader, "_wait", lambda _: None)
    monkeypatch.setitem(loader.SECONDS, "cuda", 0.0)
    journal = Journal(lambda so_far: values.append({row.provider: len(row.samples) for row in so_far.rows}))
    loader.run(RECIPE, torch.device(device), rounds=3, journal=journal)
    assert files.count(loader.OURS) == files.count(loader.DECODE) == starts
    assert values[0] == {loader.DECODE: 3 // starts} and values[-1] == {loader.OURS: 3, loader.DECODE: 3}
    assert list(journal.failures) == [loader.PILLOW] and "no such library" in journal.failures[loader.PILLOW]


def test_many_photographs_are_all_different(tmp_path: Path) -> None:
    pictures = [np.asarray(image) for image in loader.pictures(2 * loader.FIELDS + 3)]
    means = np.array([[np.abs(a[::16, ::16].astype(int) - b[::16, ::16]).mean() for b in pictures] for a in pictures])
    assert (means[~np.eye(len(pictures), dtype=bool)] > 10).all() and (np.diag(means) == 0).all()


def test_words_choose_and_leave_out_and_nothing_left_is_refused() -> None:
    rows = loader.run(RECIPE, CPU, rounds=1, only="Pillow, photometric", skip="in DALI")
    assert {row.provider for row in rows} == {loader.PILLOW, loader.KERNEL, loader.DECODE, loader.ALONE}
    for words in ({"only": "nosuch"}, {"skip": "a, o"}):
        with pytest.raises(ValueError, match="nothing to time is left: the loaders are fastmoco; Pillow, NumPy; "):
            loader.run(RECIPE, CPU, rounds=1, **words)


def test_dali_alone_decodes_as_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(loader, "cores", lambda: 8)
    fancy, gpu = dataclasses.replace(RECIPE, fancy_upsampling=True), torch.device("cuda", 0)
    for recipe in (RECIPE, fancy):
        ours = Decoding(None, recipe.fancy_upsampling).options(8, "NVIDIA H100 80GB HBM3")
        assert loader._decoding(recipe, gpu) == {"device": "mixed", **ours}
    assert loader._decoding(fancy, CPU) == {"device": "cpu"}


def test_the_bound_of_processor_time_is_decoding_and_resizing(images: Manifest) -> None:
    sample = loader._Sample
    rates = dict.fromkeys((loader.OURS, loader.PILLOW), [sample(500.0, 2.0)])
    rates |= {loader.DECODE: [sample(1000.0, 1.5)], loader.RESIZE: [sample(4000.0, 0.25)]}
    rows = {(row.name, row.provider): row for row in loader._rows(rates, {})}
    assert rows["loader, processor time", loader.ALONE].median == 1.75
    assert rows["loader, processor time", loader.OURS].share == 1.75 / 2
    assert rows["loader", loader.OURS].share == 0.5


def test_resizing_alone_cuts_what_the_loader_cuts(images: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(loader, "cut", lambda *given: (cut(*given), calls.append(given[2])))
    sources = loader.sources(RECIPE, images, CPU)
    with sources[loader.RESIZE]() as draw, sources[loader.OURS]() as ours:
        draw()
        batch = ours()
    difference = (calls[0][0].float() - batch.query_crops.float()).abs()
    assert difference.mean() < 2  # Pillow and DALI decode within rounding of each other


@pytest.mark.parametrize(
    "who", [loader.OURS, loader.PILLOW, loader.DALI, loader.DECODE, loader.RESIZE, loader.KERNEL, loader.CHAIN]
)
def test_benchmark(images: Manifest, benchmark: object, who: str) -> None:
    with loader.sources(RECIPE, images, CPU)[who]() as draw:
        for _ in range(loader.PREFETCH + 1):
            draw()
        benchmark.pedantic(draw, rounds=5)
