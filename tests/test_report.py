"""The report: whole without a network, true to the run's files, and able to stand runs of any age."""

import io
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco import report
from fastmoco.cli import main
from fastmoco.data.plan import Plan
from fastmoco.options import Options
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe
from fastmoco.train.loop import pretrain

RECIPE = replace(
    PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=8, bn_group=4, queue_size=20, epochs=2, knn_k=5, seed=3
)


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory) -> Path:
    """A run of two epochs with kNN, on images that are all of one shade."""
    root = tmp_path_factory.mktemp("report")
    for split, count in (("train", 12), ("val", 4)):
        for shade, name in ((40, "dark"), (210, "light")):
            (root / f"images/{split}/{name}").mkdir(parents=True)
            for number in range(count):
                pixels = np.full((20 + number, 24, 3), shade, np.uint8)
                Image.fromarray(pixels).save(root / f"images/{split}/{name}/{number}.png")
    pretrain(RECIPE, Options(data=root / "images", out=root / "run", device="cpu", threads=1, log_every=2), "demo")
    return root / "run"


class Requests(HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert tag not in ("script", "iframe", "object", "embed", "video")

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()


def test_nothing_is_fetched_and_every_tag_is_closed(pretrained_run):
    text = report.render(pretrained_run)
    parsed = Requests(text)
    assert parsed.open == [] and all(value.startswith("data:") for value in parsed.found)
    assert (
        not re.search(r"url\((?!#)", text)
        and "@import" not in text
        and "http" not in re.sub(r"base64,[^\"]*", "", text)
    )
    # The control: a request would be seen.
    assert Requests('<img src="https://example.org/x.png">').found == ["https://example.org/x.png"]


def test_figures_are_those_of_the_files(pretrained_run):
    text = report.render(pretrained_run, views=False)
    lines = [json.loads(line) for line in (pretrained_run / "log.jsonl").read_text().splitlines()]
    knn = [json.loads(line) for line in (pretrained_run / "knn.jsonl").read_text().splitlines()]
    assert f"<b>{lines[-1]['loss']:.3f}</b>" in text and "chance 3.045" in text
    assert f"<b>{knn[-1]['top1']:.1f}%</b>" in text and f"before training {knn[0]['top1']:.1f}%" in text
    assert "changed from preset demo: width" in text and "step_00000006" in text and "every byte as written" in text
    assert "finished" in text and str(json.loads((pretrained_run / "recipe.json").read_text())["commit"]) in text


def test_views_are_those_of_the_first_step(pretrained_run):
    facts = json.loads((pretrained_run / "recipe.json").read_text())
    pairs = report.first_views(facts, Recipe.from_dict(facts["recipe"]), count=6)
    assert len(pairs) == 6
    for name, data in pairs:
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert pixels.shape == (150, 300, 3)
        assert (pixels.mean() < 110) == name.startswith("dark")
    changed = report.first_views(facts, replace(RECIPE, seed=4), count=6)
    assert [name for name, _ in changed] != [name for name, _ in pairs], "another seed shows other images"


@pytest.mark.parametrize(
    ("dictionary", "symmetric"), [("queue", False), ("queue", True), ("batch", False), ("batch", True), ("bank", False)]
)
def test_the_pictures_are_the_first_and_the_second_view_with_every_dictionary(tmp_path, dictionary, symmetric):
    """Red tells the column and green the row, so that the mean colour of a crop tells where the plan has cut it."""
    red, green = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48))
    pixels = np.stack([red, green, np.zeros_like(red)], 2).round().astype(np.uint8)
    for number in range(12):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    plain = replace(RECIPE.augmentation, jitter_p=0.0, gray_p=0.0, blur_p=0.0, flip_p=0.0)
    recipe = replace(RECIPE.with_dictionary(dictionary), augmentation=plain, symmetric=symmetric)
    found = report.first_views({"options": {"data": str(tmp_path)}}, recipe, count=6)
    names = [f"{number}.png" for number in range(12)]
    samples = [sorted(names).index(name) for name, _ in found]
    plan = Plan(recipe, np.array([[48, 64]] * 12))

    def distances(order: tuple[int, ...]) -> np.ndarray:
        expected = [plan.boxes(0, np.array(samples), view) for view in order]
        seen = []
        for row, (_, data) in enumerate(found):
            picture = np.asarray(Image.open(io.BytesIO(data))).astype(float)
            assert picture.shape == (150, 150 * len(order), 3)
            for half, boxes in zip(np.split(picture, len(order), 1), expected, strict=True):
                top, left, height, width = boxes[row]
                centre = 255 * (left + (width - 1) / 2) / 63, 255 * (top + (height - 1) / 2) / 47
                seen.append(np.abs(half.mean((0, 1))[:2] - centre).max())
        return np.array(seen)

    order = (0,) if dictionary == "bank" else (0, 1)
    assert plan.samples(0)[:6].tolist() == samples and distances(order).max() < 5
    swapped = (1,) if dictionary == "bank" else (1, 0)
    assert distances(swapped).max() > 20, "the control"


def test_a_damaged_checkpoint_is_shown_as_such(pretrained_run, tmp_path):
    shutil.copytree(pretrained_run, tmp_path / "run", symlinks=True)
    state = next((tmp_path / "run/checkpoints").glob("step_*")) / "state.pt"
    data = bytearray(state.read_bytes())
    data[100] ^= 1
    state.write_bytes(bytes(data))
    text = report.render(tmp_path / "run", views=False)
    assert "state.pt does not have the SHA-256" in text and "every byte" not in text


def test_a_run_that_has_barely_begun_and_one_without_its_images(pretrained_run, tmp_path):
    facts = json.loads((pretrained_run / "recipe.json").read_text())
    facts["options"]["data"] = str(tmp_path / "gone <b>")
    (tmp_path / "recipe.json").write_text(json.dumps(facts))
    text = report.render(tmp_path)
    assert "nothing was logged" in text and "cannot be shown" in text and "gone &lt;b&gt;" in text


def test_evaluations_appear_with_their_circumstances(pretrained_run, tmp_path):
    shutil.copytree(pretrained_run, tmp_path / "run", symlinks=True)
    figures = {
        "step": 6,
        "top1": 87.5,
        "top5": 100.0,
        "classes": 2,
        "queries": 8,
        "backbone": "bit-equal after the probe",
        "protocol": {"epochs": 100, "batch_size": 24, "lr": 30.0},
    }
    (tmp_path / "run/linear.json").write_text(json.dumps(figures))
    Image.new("RGB", (9, 9)).save(tmp_path / "run/linear.png")
    text = report.render(tmp_path / "run", views=False)
    assert "87.50%" in text and "100 epochs, batch 24, lr 30 for 256, backbone bit-equal" in text
    assert 'alt="Linear probe"' in text


def test_a_narrow_screen_gets_each_figure_with_its_name(pretrained_run):
    """Below 600 px the tables with a head are lists: their columns found no room, and were cut."""
    text = report.render(pretrained_run, views=False)
    rows = re.findall(r"<tr>(.*?)</tr>", text.split("<h2>Evaluation</h2>")[1].split("</table>")[0])
    names = re.findall(r"<th>(.*?)</th>", rows[0])
    assert names[1:] == ["top-1", "top-5", "step", "images", "how"]
    for row in rows[1:]:
        assert re.findall(r'data-of="(.*?)"', row) == names[1:]
    assert re.search(r"@media \(max-width: 600px\) \{ \.figures.*display: block", text)


def test_detectors_appear_beside_their_control(pretrained_run, tmp_path):
    run = shutil.copytree(pretrained_run, tmp_path / "run", symlinks=True)
    assert "<h2>Detection" not in report.render(run, views=False)
    figures = {"AP": 12.5, "AP50": 31.25, "AP75": 8.0, "iterations": 500, "batch_size": 8, "lr": 0.01, "size": 480}
    for name, ap50 in (("detection", 31.25), ("detection-untrained", 9.75)):
        (run / name).mkdir()
        text = json.dumps(figures | {"AP50": ap50, "metric": "the rule of VOC 2007"})
        (run / name / "detection.json").write_text(text)
    Image.new("RGB", (9, 9)).save(run / "detection/detections.png")
    text = report.render(run, views=False)
    assert "31.25" in text and "9.75" in text and "500 steps of 8" in text and text.count("Detections, ") == 2


def test_the_map_is_drawn_where_it_is_asked_for(pretrained_run, tmp_path, capsys):
    run = shutil.copytree(pretrained_run, tmp_path / "run", symlinks=True)
    assert "map.png" not in os.listdir(run) and main(["report", str(run), "--map", "--no-views"]) == 0
    assert "stand together" in (run / "report.html").read_text()
    assert re.search(r"map.png: \d+ images by (PCA|UMAP)", capsys.readouterr().out)


def test_the_command(pretrained_run, tmp_path, capsys):
    assert main(["report", str(pretrained_run), "--no-views"]) == 0
    assert (pretrained_run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(pretrained_run), "--out", str(tmp_path / "a.html"), "--no-views"]) == 0
    assert (tmp_path / "a.html").is_file()
    assert main(["report", str(tmp_path)]) == 2 and "is no run" in capsys.readouterr().err
