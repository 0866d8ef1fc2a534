"""`search` and `duplicates`: what they find among made images, what they write, and what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.data import manifest
from fastmoco.evaluate import index as index_module
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint

RECIPE = replace(PRESETS["demo"][1], width=0.25, batch_size=8, bn_group=4, queue_size=20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose encoder has its first weights: they tell these images apart well enough."""
    out = tmp_path_factory.mktemp("trained") / "run"
    checkpoint.save(out, 0, Step(RECIPE, Parallel(), "fp32").state(), {"recipe": RECIPE.as_dict()})
    (out / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_dict(), "options": {}}))
    return out


def drawn(seed: int) -> Image.Image:
    """Random blobs of colour, another picture for each seed."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((72, 60), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of two classes, and of five of them a second copy: compressed, smaller, cut, brighter, as PNG."""
    root = tmp_path_factory.mktemp("pictures")
    for label in ("a", "b"):
        (root / label).mkdir()
    for seed in range(40):
        drawn(seed).save(root / ("a" if seed % 2 else "b") / f"{seed}.png")
    drawn(1).save(root / "a/1-copy.jpg", quality=60)
    drawn(2).resize((48, 40)).save(root / "b/2-copy.png")
    drawn(3).crop((2, 2, 70, 58)).save(root / "a/3-copy.png")
    ImageEnhance.Brightness(drawn(4)).enhance(1.04).save(root / "b/4-copy.png")
    drawn(5).save(root / "a/5-copy.png")
    return root


COPIES = [{f"{folder}/{i}.png", f"{folder}/{i}-copy.{end}"} for i, folder, end in (
    (1, "a", "jpg"), (2, "b", "png"), (3, "a", "png"), (4, "b", "png"), (5, "a", "png"))]  # fmt: skip


def ask(command: str, run, *more) -> int:
    return main([command, str(run), *map(str, more), "--device", "cpu", "--threads", "1"])


def test_the_copy_of_an_image_is_its_nearest_neighbour(trained, pictures, tmp_path, capsys):
    asked = [pictures / "a/5.png", pictures / "b/2-copy.png"]
    assert ask("search", trained, *asked, "--data", pictures, "--k", 3, "--out", tmp_path) == 0
    said = json.loads((tmp_path / "search.json").read_text())
    assert said["images"] == 45 and [line["image"] for line in said["queries"]] == [str(path) for path in asked]
    best = [line["neighbours"][0] for line in said["queries"]]
    assert [one["file"] for one in best] == ["a/5-copy.png", "b/2.png"] and best[0]["class"] == "a"
    assert best[0]["similarity"] == pytest.approx(1, abs=1e-5)
    for line in said["queries"]:
        found = [one["similarity"] for one in line["neighbours"]]
        assert len(found) == 3 and found == sorted(found, reverse=True)
        assert str(pictures / line["neighbours"][0]["file"]) != line["image"], "an image is no neighbour of its own"
    sheet = Image.open(tmp_path / "search.png")
    assert sheet.size[0] > 4 * 96 and sheet.size[1] > 2 * 96
    assert "a/5-copy.png" in capsys.readouterr().out


def test_an_image_from_elsewhere_and_a_folder_may_be_looked_for(trained, pictures, tmp_path):
    (tmp_path / "other").mkdir()
    drawn(7).convert("RGB").save(tmp_path / "other/seven.jpg", quality=90)
    drawn(8).save(tmp_path / "other/eight.png")
    assert ask("search", trained, tmp_path / "other", "--data", pictures, "--out", tmp_path) == 0
    lines = json.loads((tmp_path / "search.json").read_text())["queries"]
    assert [line["neighbours"][0]["file"] for line in lines] == ["b/8.png", "a/7.png"]


def test_features_are_computed_once_and_anew_where_an_image_changed(trained, pictures, tmp_path, monkeypatch):
    folder = shutil.copytree(pictures, tmp_path / "images")
    counted = []

    def counting(encoder, images, *args, **kwargs):
        counted.append(len(images))
        return plain(encoder, images, *args, **kwargs)

    plain = index_module.encode
    monkeypatch.setattr(index_module, "encode", counting)
    for _ in range(2):
        assert ask("search", trained, folder / "a/1.png", "--data", folder, "--out", tmp_path) == 0
    assert counted == [45, 1, 1]
    drawn(99).save(folder / "a/1-copy.jpg")
    assert ask("search", trained, folder / "a/1.png", "--data", folder, "--out", tmp_path) == 0
    assert counted[3:] == [45, 1]
    best = json.loads((tmp_path / "search.json").read_text())["queries"][0]["neighbours"][0]
    assert best["file"] != "a/1-copy.jpg"
    assert ask("search", trained, folder / "a/1.png", "--data", folder, "--out", tmp_path, "--untrained") == 0
    assert counted[5:] == [45, 1] and (tmp_path / "search-untrained.json").is_file()


def test_the_groups_are_the_copies(trained, pictures, tmp_path, capsys):
    out, kept = tmp_path / "found", tmp_path / "kept.txt"
    assert ask("duplicates", trained, "--data", pictures, "--out", out, "--keep", kept) == 0
    said = json.loads((out / "duplicates.json").read_text())
    assert sorted(map(sorted, COPIES)) == sorted(sorted(group["files"]) for group in said["groups"])
    assert said["threshold_from"] == "measured" and said["usual_similarity_of_the_nearest"] < said["threshold"] < 1
    assert all(said["threshold"] <= group["least_similar_pair"] <= 1.00001 for group in said["groups"])
    assert Image.open(out / "duplicates.png").size[1] > 5 * 96
    assert "5 groups" in capsys.readouterr().out
    left = manifest.scan(kept)
    assert len(left) == 40 and left.classes == ["a", "b"]
    assert "2.png" in str(left.paths) and "2-copy.png" not in str(left.paths), "the larger one is kept"
    # The control: without the copies there are no groups.
    assert (
        ask("duplicates", trained, "--data", kept, "--out", tmp_path / "again", "--threshold", said["threshold"]) == 0
    )
    assert json.loads((tmp_path / "again/duplicates.json").read_text())["groups"] == []
    assert not (tmp_path / "again/duplicates.png").exists()


def test_an_encoder_that_tells_nothing_apart_says_so(trained, pictures, tmp_path, capsys):
    assert ask("duplicates", trained, "--data", pictures, "--out", tmp_path, "--threshold", "-0.9") == 0
    assert "hardly tells these images apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "at least one image"),
        (["nowhere.png"], "nowhere.png: no such file"),
        (["notes.txt"], "notes.txt: not an image: look for other images"),
        (["picture.gif"], "picture.gif: GIF, which DALI cannot decode: look for other images"),
        (["whole.png", "picture.gif"], "picture.gif: GIF, which DALI cannot decode: look for other images"),
        (["damaged.png"], "damaged.png: damaged: cannot be decoded: look for other images"),
        (["whole.png", "damaged.png", "damaged2.png"], "damaged.png: damaged: cannot be decoded: look for"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*in its place")
def test_what_cannot_be_looked_for_is_one_line(trained, pictures, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    drawn(1).save("picture.gif")
    drawn(1).save("whole.png")
    data = bytearray(Path("whole.png").read_bytes())
    data[90:130] = bytes(40)  # which headers do not show
    for name in ("damaged.png", "damaged2.png"):
        Path(name).write_bytes(data)
    assert ask("search", trained, *words, "--data", pictures) == 2
    assert said in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_a_list_is_not_replaced(trained, pictures, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert ask("duplicates", trained, "--data", pictures, "--keep", tmp_path / "kept.txt") == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "kept.txt").read_text() == "mine"
