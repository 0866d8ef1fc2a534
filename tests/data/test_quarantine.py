"""Bad samples never stop a run: they are named, replaced and recorded, and the records make the same run again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import ALONE, CPU, all_equal, batches
from PIL import Image

from fastmoco.contrast.step import Step
from fastmoco.data.batch import Batch
from fastmoco.data.loader import EvaluationLoader, Loader
from fastmoco.data.manifest import DataError, Manifest, scan
from fastmoco.data.pipeline import undecodable
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine, Record
from fastmoco.data.request import DecodeError
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.process import crash_points
from fastmoco.recipe import Recipe
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.train.loop import pretrain

RECIPE = dataclasses.replace(PRESETS["v2"][1], batch_size=40, bn_group=4, crop_size=24, max_bad_share=0.1)
WriteSet = Callable[[Path, int], dict[str, str]]
INSIDE = {"no tables", "harmed webp", "harmed png", "cut tiff"}  # what a scan of headers cannot see
BROKEN = INSIDE | {"empty", "page", "gif", "huge", "cut jpeg", "cut bmp"}


@pytest.fixture
def dirty(tmp_path: Path, write_set: WriteSet) -> Manifest:
    write_set(tmp_path / "dirty", 200)
    return scan(tmp_path / "dirty", cache=False)


def files(path: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]


def test_exactly_the_broken_ones_are_replaced_and_the_records_make_the_run_again(
    dirty: Manifest, tmp_path: Path
) -> None:
    kinds = {path.split(" ", 1)[1].removesuffix(".jpg") for path in dirty.paths}
    assert INSIDE <= kinds and {"page", "gif", "empty", "huge", "cut jpeg", "cut bmp"}.isdisjoint(kinds)
    path = tmp_path / "quarantine.jsonl"
    two_epochs = range(10)  # so that each sample is seen
    first = batches(dirty, RECIPE, two_epochs, quarantine=Quarantine(dirty, path, 0.1))
    records = files(path)
    assert {record.file.split(" ", 1)[1].removesuffix(".jpg") for record in records} == INSIDE
    arguments = Quarantine(dirty, path, 0.1)
    assert (
        len(arguments) == 4
        and all_equal(first, batches(dirty, RECIPE, range(10), quarantine=arguments))
        and not arguments.news
    )
    for options in ({"threads": 3}, {"prefetch": 7}):
        assert all_equal(first, batches(dirty, RECIPE, range(10), quarantine=Quarantine(dirty, None, 0.1), **options))
    assert all_equal(first[3:], batches(dirty, RECIPE, range(3, 10), quarantine=Quarantine(dirty, path, 0.1)))
    assert files(path) == records  # nothing was found anew
    plan = Plan(RECIPE, dirty.sizes)
    for record in records:  # the substitute shows its own pixels and boxes, with the parameters of the slot's sample
        bad = dirty.find(record.file)
        (other,) = arguments.replace(record.step, np.array([bad]))  # the next good one: a substitute may be bad itself
        epoch = record.step // plan.steps_per_epoch
        if bad not in plan.samples(record.step):  # it was found as a substitute
            continue
        slot = plan.samples(record.step).tolist().index(bad)
        origins = first[record.step]
        alone = _crops_of(dirty, plan, other, epoch)
        assert torch.equal(origins.query_crops[slot], alone[0]) and torch.equal(origins.key_crops[slot], alone[1])
        samples = plan.photometric(epoch, np.array([bad]), 0)[0]
        np.testing.assert_array_equal(origins.query_parameters[slot], samples)
    with pytest.raises(DecodeError):  # the control: without a quarantine the run dies
        batches(dirty, RECIPE, range(10), quarantine=None)


def _crops_of(manifest: Manifest, plan: Plan, sample: int, epoch: int) -> torch.Tensor:
    from fastmoco.data.pipeline import Pipeline
    from fastmoco.data.request import Request

    boxes = np.stack([plan.boxes(epoch, np.array([sample]), view) for view in (0, 1)])
    request = Request(["x"], [manifest.read(sample)], manifest.sizes[[sample]], boxes)
    (crops,) = Pipeline([request], batch_size=1, crop_size=24, views=2, device=CPU, threads=1)
    return crops[:, 0]


def test_a_batch_says_which_samples_it_shows(dirty: Manifest) -> None:
    """Over an epoch: as planned where the image is good, and its substitute, found by its pixels, where it is not."""
    plan, quarantine = Plan(RECIPE, dirty.sizes), Quarantine(dirty, None, 0.1)
    bad, replaced = set(_inside(dirty)), {}
    for batch in batches(dirty, RECIPE, range(plan.steps_per_epoch), quarantine=quarantine):
        shown = batch.origins.numpy()
        assert shown.dtype == np.int64 and set(batch.sample[shown != batch.sample]) == bad & set(batch.sample)
        for slot in (shown != batch.sample).nonzero()[0]:
            crops = _crops_of(dirty, plan, int(shown[slot]), 0)
            assert torch.equal(batch.query_crops[slot], crops[0]) and torch.equal(batch.key_crops[slot], crops[1])
            replaced[int(batch.sample[slot])] = int(shown[slot])
    assert replaced and not bad & set(replaced.values())


def test_a_bank_is_written_where_images_were_shown(dirty: Manifest) -> None:
    small = {"arch": "resnet18", "width": 0.0625, "stem": "cifar", "dim": 16, "crop_size": 12, "queue_size": 30}
    recipe = dataclasses.replace(PRESETS["bank"][1], **small, batch_size=40, bn_group=4, max_bad_share=0.1)
    step, plan = Step(recipe, Parallel(), "fp32", images=len(dirty)), Plan(recipe, dirty.sizes)
    start, shown = step.dictionary.bank.clone(), set()
    for batch in batches(dirty, recipe, range(plan.steps_per_epoch), quarantine=Quarantine(dirty, None, 0.1)):
        step.step(batch, 0.03)
        shown |= set(batch.origins.tolist())
    moved = set((step.dictionary.bank != start).any(1).nonzero().flatten().tolist())
    assert moved == shown and not shown & set(_inside(dirty)) and len(shown) > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("load", [0.0, 1.0])
def test_a_truncated_jpeg_on_a_gpu_harms_no_other_image(photo_folder: Path, tmp_path: Path, load: float) -> None:
    """Its engine calls every image a success; but the end is looked for before, the run goes on, no other is blamed."""
    manifest = scan(shutil.copytree(photo_folder, tmp_path / "copy"), cache=False)
    gpu = SimpleNamespace(rank=0, world=1, device=torch.device("cuda", 0))
    plan, steps, options = Plan(RECIPE, manifest.sizes), range(2), {"parallel": gpu, "hw_decoder_load": load}
    clean = batches(manifest, RECIPE, steps, quarantine=Quarantine(manifest, None, 0.1), **options)
    victim = next(sample for sample in plan.samples(1).tolist() if " jpeg." in manifest.paths[sample])
    path = Path(manifest.path(victim))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    quarantine = Quarantine(manifest, None, 0.1)
    result = batches(manifest, RECIPE, steps, quarantine=quarantine, **options)
    culprits = {record.file for record in quarantine.news}
    assert culprits == {manifest.paths[victim]}
    for before, after in zip(clean, result, strict=True):
        for name in ("query_crops", "key_crops"):  # both in the order of the slots
            same = (getattr(before, name) == getattr(after, name)).flatten(1).all(1).cpu().numpy()
            assert same[before.sample != victim].all()
            assert not same[before.sample == victim].any()


def test_ranks_agree_without_a_word(dirty: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    whole = batches(dirty, RECIPE, range(10), quarantine=Quarantine(dirty, None, 0.1))

    def rank(number: int) -> list[Batch]:
        plan = Plan(RECIPE, dirty.sizes, 2, number)
        place = SimpleNamespace(rank=number, world=2, device=CPU, exchange=lambda crops, *_: crops)
        quarantine = Quarantine(dirty, path, 0.1)
        with Loader(dirty, plan, place, range(10), quarantine=quarantine) as loader:
            return list(loader)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(rank, range(2)))
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].query_crops for part in parts]), batch.query_crops)
    assert {record.file for record in files(path)} == {dirty.paths[i] for i in _inside(dirty)}
    assert all_equal(whole, batches(dirty, RECIPE, range(10), quarantine=Quarantine(dirty, path, 0.1)))


def _inside(manifest: Manifest) -> list[int]:
    return [i for i, name in enumerate(manifest.paths) if name.split(" ", 1)[1].removesuffix(".jpg") in INSIDE]


@pytest.mark.parametrize("harm", ["deleted", "truncated", "replaced"])
def test_files_harmed_while_a_run_reads_them(tmp_path: Path, write_set: WriteSet, harm: str) -> None:
    write_set(tmp_path / "clean", 200)
    manifest = scan(tmp_path / "clean", cache=False)
    for i in _inside(manifest):
        shutil.copy(manifest.path(30), manifest.path(i))
    manifest = scan(tmp_path / "clean", cache=False)
    plan, path = Plan(RECIPE, manifest.sizes), tmp_path / "quarantine.jsonl"
    with Loader(manifest, plan, ALONE, range(12), quarantine=Quarantine(manifest, path, 0.1)) as loader:
        result = [next(loader)]
        victims = [int(sample) for sample in plan.samples(8)[:3]]
        for victim in victims:
            _harm(Path(manifest.path(victim)), harm)
        result += list(loader)
    records = files(path)
    assert sorted(record.file for record in records) == sorted(manifest.paths[victim] for victim in victims)
    assert all(record.step > 0 and record.reason for record in records)
    # The run is the same from any checkpoint on; before the record's step the file was still what it had been.
    first = min(record.step for record in records)
    again = batches(manifest, RECIPE, range(first, 12), quarantine=Quarantine(manifest, path, 0.1))
    assert all_equal(again, result[first:]) and path.read_text().count("\n") == 3


def test_a_huge_image_takes_no_memory(tmp_path: Path, write_set: WriteSet, growth: Callable) -> None:
    data, limit = tmp_path / "data", 10_000_000
    for name in write_set(data, 200).values():
        (data / name).unlink()
    Image.new("L", (8000, 8000)).save(tmp_path / "huge", "JPEG")  # 192 MB once decoded
    shutil.copy(tmp_path / "huge", data / "huge.jpg")
    for full in (False, True):
        with growth() as growth_of:
            manifest = scan(data, max_pixels=limit, decode=undecodable if full else None, cache=False)
        assert manifest.rejected == [("huge.jpg", "8000 x 8000 pixels, over the limit of 10000000")]
        assert growth_of() < 100e6
    plan, quarantine = Plan(RECIPE, manifest.sizes), Quarantine(manifest, None, 0.1)
    with Loader(manifest, plan, ALONE, range(12), quarantine=quarantine) as loader, growth() as growth_of:
        next(loader)
        shutil.copy(tmp_path / "huge", manifest.path(plan.samples(10)[0]))
        assert len(list(loader)) == 11
    (record,) = quarantine.news
    assert record.reason.startswith("is 8000 x 8000 pixels, but was") and growth_of() < 100e6
    with growth() as growth_of:  # the control
        assert len(scan(data, decode=undecodable, cache=False).rejected) == 0
    assert growth_of() > 180e6


def test_a_run_leaves_out_what_is_over_its_limit_of_pixels(tmp_path: Path, write_set: WriteSet) -> None:
    write_set(tmp_path / "data", 200)
    small = scan(tmp_path / "data", max_pixels=3600)
    assert 100 < len(small) < len(scan(tmp_path / "data"))
    recipe, out = dataclasses.replace(SMALL, max_pixels=3600), tmp_path / "run"
    pretrain(recipe, options(tmp_path / "data", out, stop_after=1))
    assert Manifest.load(out / "images.npz", tmp_path / "data").paths == small.paths


def _harm(path: Path, harm: str) -> None:
    if harm == "deleted":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        Image.new("RGB", (7, 9)).save(path, "JPEG")


def test_too_many_bad_samples_stop_the_run(dirty: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    with pytest.raises(DataError, match=r"4 of 19\d images are bad, and max_bad_share 0.016 allows 3; .*max-bad-share"):
        batches(dirty, RECIPE, range(10), quarantine=Quarantine(dirty, path, 0.016))
    assert len(batches(dirty, RECIPE, range(10), quarantine=Quarantine(dirty, path, 0.03))) == 10
    strict = Quarantine(dirty, None, 0.0)
    strict.add(0, 5, "torn")  # one is always allowed
    with pytest.raises(DataError, match="2 of"):
        strict.add(0, 6, "torn")


def test_a_record_counts_from_its_step_on_and_chains_are_followed() -> None:
    manifest = Manifest("", [f"{i}" for i in range(5)], np.ones((5, 2), np.int32))
    quarantine = Quarantine(manifest, None, 1.0)
    assert quarantine.add(7, 3, "torn") == 4 and quarantine.add(9, 4, "torn") == 0
    samples = np.array([2, 3, 4])
    for step, expected in ((6, [2, 3, 4]), (7, [2, 4, 4]), (8, [2, 4, 4]), (9, [2, 0, 0])):
        np.testing.assert_array_equal(quarantine.replace(step, samples), expected)
    assert quarantine.add(5, 3, "torn") == 4 and quarantine.replace(5, samples).tolist() == [2, 4, 4]
    with pytest.raises(DataError, match="all 5 images are bad"):
        for sample in (0, 1, 2):
            quarantine.add(9, sample, "torn")


def test_the_file_survives_a_crash_and_its_damage_is_told(tmp_path: Path) -> None:
    manifest = Manifest("", ["a", "b", "c"], np.ones((3, 2), np.int32))
    path = tmp_path / "quarantine.jsonl"
    Quarantine(manifest, path, 1.0).add(1, 0, "torn")
    with path.open("a") as file:
        file.write('{"step": 2, "fi')  # the machine stopped here
    quarantine = Quarantine(manifest, path, 1.0)
    assert len(quarantine) == 1
    quarantine.add(3, 1, "torn")
    assert [record.file for record in files(path)] == ["a", "b"] and len(Quarantine(manifest, path, 1.0)) == 2
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(DataError, match="is damaged"):
        Quarantine(manifest, path)


def test_evaluation_warns_and_goes_on(dirty: Manifest) -> None:
    strict = dataclasses.replace(RECIPE, max_bad_share=Recipe.max_bad_share)
    with EvaluationLoader(dirty, strict, CPU, batch_size=64) as loader, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match="of 19\\d images are bad"):  # four where one in a thousand is allowed
            list(loader)
    assert len(told) <= 1
    with EvaluationLoader(dirty, RECIPE, CPU, batch_size=64) as loader:
        with pytest.warns(UserWarning, match="evaluating"):
            assert sum(len(crops) for crops, _ in loader) == len(dirty)
    one = [i for i in range(len(dirty)) if i not in _inside(dirty) or "harmed png" in dirty.paths[i]]
    with EvaluationLoader(dirty, strict, CPU, indices=np.array(one)) as loader:
        with pytest.warns(UserWarning, match="harmed png.jpg: damaged: cannot be decoded; evaluating"):
            crops, index = next(loader)
    assert len(crops) == len(index) == len(one)
    samples = np.array(one)
    (bad,) = [at for at, i in enumerate(one) if "harmed png" in dirty.paths[i]]
    assert np.flatnonzero(index != samples).tolist() == [bad], "a substitute comes with its own index"


SMALL = dataclasses.replace(
    PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=40, bn_group=4, queue_size=80, epochs=2, max_bad_share=0.1
)


def options(data: Path, out: Path, **changes: object) -> Options:
    return Options(data=data, out=out, **{"device": "cpu", "threads": 1, "knn": False, **changes})


def state(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(out)).state


def same_state(one: Path, other: Path) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_whole_run_over_a_dirty_folder(
    tmp_path: Path, write_set: WriteSet, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_set(data, 200)
    pretrain(SMALL, options(data, out))
    output, records = capsys.readouterr().err, files(out / "quarantine.jsonl")
    assert len({record.file for record in records}) == 4
    assert all(f"quarantine: {record.file}: " in output for record in records)
    again = tmp_path / "given"
    again.mkdir()
    shutil.copy(out / "quarantine.jsonl", again)
    pretrain(SMALL, options(data, again, resume=True))
    assert same_state(out, again) and files(again / "quarantine.jsonl") == records
    cut = tmp_path / "cut"
    pretrain(SMALL, options(data, cut, stop_after=3))
    pretrain(SMALL, options(data, cut, resume=True))
    assert same_state(out, cut)
    # Files lost between two parts of a run: it keeps its list of images, and does without the lost ones.
    lost = tmp_path / "lost"
    pretrain(SMALL, options(data, lost, stop_after=1))
    plan = Plan(SMALL, scan(data).sizes)
    late = [sample for sample in plan.samples(3).tolist() if "plain" in scan(data).paths[sample]][:2]
    names = [scan(data).paths[sample] for sample in late]
    for name in names:
        (data / name).rename(tmp_path / name)
    pretrain(SMALL, options(data, lost, resume=True))
    assert set(names) <= {record.file for record in files(lost / "quarantine.jsonl")}
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for name in names:
        (tmp_path / name).rename(data / name)
    shutil.copy(lost / "quarantine.jsonl", fresh)
    pretrain(SMALL, options(data, fresh, resume=True))
    assert same_state(lost, fresh) and not same_state(lost, out)
    with pytest.raises(DecodeError):  # the control
        pretrain(SMALL, options(data, tmp_path / "strict", quarantine=False))


def figures(out: Path) -> list[dict]:
    names = ("step", "epoch", "lr", "loss", "top1", "top5")
    return [{name: line[name] for name in names} for line in read_lines(out / "log.jsonl")]


def test_files_harmed_while_a_whole_run_reads_them(
    tmp_path: Path, write_set: WriteSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, again = tmp_path / "data", tmp_path / "run", tmp_path / "again"
    for name in write_set(data, 200).values():
        (data / name).unlink()
    manifest = scan(data)
    recipe = dataclasses.replace(SMALL, epochs=3)
    plan = Plan(recipe, manifest.sizes)
    harms = ("deleted", "truncated", "replaced")
    # Of the last step: those of the next few are read already.
    harmed = dict(zip(harms, (manifest.paths[i] for i in plan.samples(11).tolist()), strict=False))
    original = {name: (data / name).read_bytes() for name in harmed.values()}

    def reach(point: str) -> None:
        if point == "after step" and len(list(data.iterdir())) == len(manifest):
            for harm, name in reversed(harmed.items()):
                _harm(data / name, harm)

    monkeypatch.setattr(crash_points, "reach", reach)
    pretrain(recipe, options(data, out, log_every=1, decoded_cache=0))
    monkeypatch.undo()
    output, records = capsys.readouterr().err, files(out / "quarantine.jsonl")
    assert [line["step"] for line in figures(out)] == list(range(1, 13))
    assert {record.file for record in records} == set(harmed.values()) and min(records).step > 1
    for harm, why in zip(harms, ("No such file", "truncated", "is 7 x 9 pixels"), strict=True):
        lines = [line for line in output.splitlines() if line.startswith(f"quarantine: {harmed[harm]}: ")]
        assert lines and all(why in line and "takes its place" in line for line in lines)
    # The files put back, and the records given from the start: the same run.
    for name, content in original.items():
        (data / name).write_bytes(content)
    again.mkdir()
    shutil.copy(out / "quarantine.jsonl", again)
    pretrain(recipe, options(data, again, log_every=1, resume=True))
    assert figures(again) == figures(out) and same_state(out, again)
    pretrain(recipe, options(data, tmp_path / "sound", log_every=1))  # the control
    assert figures(tmp_path / "sound") != figures(out) and not same_state(out, tmp_path / "sound")


@pytest.mark.slow
def test_2000_files_of_which_ten_are_broken(
    tmp_path: Path, write_set: WriteSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, out, again = (tmp_path / name for name in ("data", "run", "given"))
    names = write_set(data, 2000)
    broken = {names[kind] for kind in BROKEN}
    assert len(broken) == 10 and len(names) == 18
    full = scan(data, decode=undecodable, cache=False)  # training must not know what it found
    assert {path for path, _ in full.rejected} == broken and len(full) == 1990
    recipe = dataclasses.replace(SMALL, max_bad_share=0.01)
    pretrain(recipe, options(data, out, log_every=1, decoded_cache=0))
    output, records = capsys.readouterr().err, files(out / "quarantine.jsonl")
    left_out = {path for path, _ in scan(data).rejected}
    assert len(left_out) == 6 and "6 files left out" in output
    assert left_out | {record.file for record in records} == broken
    assert len(figures(out)) == 2 * (1994 // recipe.batch_size)
    # The substitutes from the first step on, instead of from the step that found the bad one.
    again.mkdir()
    lines = [json.dumps({**record._asdict(), "step": 0}) for record in records]
    (again / "quarantine.jsonl").write_text("\n".join([*lines, ""]))
    pretrain(recipe, options(data, again, log_every=1, resume=True))
    assert figures(again) == figures(out) and same_state(out, again)
    assert len(files(again / "quarantine.jsonl")) == len(records)  # nothing was found anew
    with pytest.raises(DecodeError):  # the control
        pretrain(recipe, options(data, tmp_path / "strict", quarantine=False))
    with pytest.raises(DataError, match="2 of 1994 images are bad, and max_bad_share 0.001 allows 1"):
        pretrain(dataclasses.replace(recipe, max_bad_share=0.001), options(data, tmp_path / "default"))
