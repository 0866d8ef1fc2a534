"""Embeddings: a row per image beside its name, equal to the encoder's own features."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmoco
from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.data import manifest
from fastmoco.data.errors import DataError
from fastmoco.data.loader import Loading
from fastmoco.evaluate.features import extract
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs import checkpoint, run_folder

RECIPE = replace(PRESETS["demo"][1], width=0.125, crop_size=16, batch_size=8, bn_group=4, queue_size=20)


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    checkpoint.save(out, 0, Step(RECIPE, Parallel(), "fp32").state(), {"recipe": RECIPE.as_dict()})
    (out / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_dict(), "options": {}}))
    return out


def embed(pretrained_run, data, out, *more) -> int:
    where = ["--data", str(data), "--out", str(out), "--device", "cpu", "--threads", "1"]
    return main(["embed", str(pretrained_run), *where, *more])


def test_rows_belong_to_their_files(pretrained_run, stripes, tmp_path):
    assert embed(pretrained_run, stripes / "val", tmp_path / "a.npz") == 0
    images = manifest.scan(stripes / "val")
    encoder, recipe, _ = run_folder.load_encoder(pretrained_run, Parallel())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as data:
        assert data["files"].tolist() == images.paths and data["classes"].tolist() == ["across", "down"]
        assert data["labels"].tolist() == images.labels.tolist()
        expected = extract(encoder, images, recipe, Parallel(), loading=Loading(threads=1), normalise=False)[0]
        torch.testing.assert_close(torch.from_numpy(data["features"]), expected, rtol=0, atol=1e-5)
        assert np.abs(np.linalg.norm(data["features"], axis=1) - 1).min() > 1e-3


def test_untrained_features_are_those_of_the_first_weights(pretrained_run, stripes, tmp_path):
    moved = shutil.copytree(pretrained_run, tmp_path / "run", symlinks=True)
    state = checkpoint.load(checkpoint.latest(pretrained_run)).state
    state["encoder_q.conv1.weight"].neg_()
    checkpoint.save(moved, 3, state, {"recipe": RECIPE.as_dict()})
    assert embed(moved, stripes / "val", tmp_path / "first.npz", "--untrained") == 0
    assert embed(moved, stripes / "val", tmp_path / "last.npz") == 0
    assert embed(pretrained_run, stripes / "val", tmp_path / "expected.npz") == 0
    first, last, expected = (np.load(tmp_path / f"{name}.npz")["features"] for name in ("first", "last", "expected"))
    np.testing.assert_array_equal(first, expected)
    assert not np.array_equal(last, expected)  # the control


def test_a_file_that_cannot_be_decoded_has_no_row(pretrained_run, stripes, tmp_path, capsys):
    folder = shutil.copytree(stripes / "val", tmp_path / "images")
    assert (
        embed(pretrained_run, folder, tmp_path / "whole.npz") == 0 and "; 0 files left out" in capsys.readouterr().out
    )
    victim = folder / "across/3.jpg"
    pixels = Image.open(victim)
    pixels.save(victim, "PNG")
    data = bytearray(victim.read_bytes())
    data[90:130] = bytes(40)  # which headers do not show
    victim.write_bytes(data)
    with pytest.warns(UserWarning, match="across/3.jpg"):
        assert embed(pretrained_run, folder, tmp_path / "rest.npz") == 0
    assert "11 images" in (output := capsys.readouterr().out)
    said = f"; 1 file left out (across/3.jpg: damaged: cannot be decoded): fastmoco data scan --full {folder} lists it"
    assert said in output
    for name in ("words.jpg", "more.jpg"):
        (folder / name).write_text("words")
    with pytest.warns(UserWarning, match="across/3.jpg"):
        found = fastmoco.embed(pretrained_run, folder, threads=1)
    assert found.rejected == [
        ("across/3.jpg", "damaged: cannot be decoded"),
        ("more.jpg", "not an image"),
        ("words.jpg", "not an image"),
    ]
    assert found.left_out == 3
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "rest.npz") as rest:
        kept = whole["files"] != "across/3.jpg"
        assert rest["files"].tolist() == whole["files"][kept].tolist()
        assert rest["labels"].tolist() == whole["labels"][kept].tolist()
        np.testing.assert_allclose(rest["features"], whole["features"][kept], rtol=0, atol=1e-5)


def test_from_python_it_is_the_command(pretrained_run, stripes, tmp_path):
    """And what an encoder makes of one picture at a time."""
    assert embed(pretrained_run, stripes / "val", tmp_path / "a.npz") == 0
    encoder = fastmoco.load(pretrained_run)
    for source in (encoder, pretrained_run):
        found = fastmoco.embed(source, stripes / "val", threads=1)
        with np.load(tmp_path / "a.npz") as data:
            assert np.array_equal(found.features, data["features"]) and found.files == data["files"].tolist()
            assert np.array_equal(found.labels, data["labels"]) and found.classes == data["classes"].tolist()
    assert repr(found).startswith("Embedding(features float32 [12, 64], files ['across/0.jpg', 'across/1.jpg', ...], 0")
    assert found.left_out == 0 and Path(found.images.path(0)) == stripes / "val/across/0.jpg"


def test_pictures_one_at_a_time_have_the_features_of_their_rows(pretrained_run, stripes, tmp_path):
    for number in range(3):  # lossless, for two decoders of JPEG may differ by a level
        Image.open(stripes / f"val/down/{number}.jpg").save(tmp_path / f"{number}.png")
    encoder = fastmoco.load(pretrained_run)
    found = fastmoco.embed(encoder, tmp_path, threads=1)
    alone = encoder.features(torch.stack([encoder.transform(tmp_path / f"{number}.png") for number in range(3)]))
    np.testing.assert_allclose(found.features, alone.numpy(), rtol=0, atol=1e-5)


def test_rows_of_a_list_stand_in_its_order(pretrained_run, stripes, tmp_path):
    (tmp_path / "words.jpg").write_text("words")
    down, across = stripes / "val/down/2.jpg", stripes / "val/across/1.jpg"
    asked = [down, tmp_path / "words.jpg", across, down]
    found = fastmoco.embed(pretrained_run, asked, threads=1)
    assert found.files == [str(asked[i]) for i in (0, 2, 3)] and found.left_out == 1
    assert found.rejected == [(str(asked[1]), "not an image")]
    whole = fastmoco.embed(pretrained_run, stripes / "val", threads=1)
    rows = [whole.features[whole.files.index(name)] for name in ("down/2.jpg", "across/1.jpg", "down/2.jpg")]
    np.testing.assert_allclose(found.features, rows, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="name at least one"):
        fastmoco.embed(pretrained_run, [])


def test_a_path_that_does_not_exist_is_an_error(pretrained_run, stripes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = stripes / "val/down/2.jpg"
    with pytest.raises(ValueError, match=r"photos/nosuch.jpg: no such file: check the path"):
        fastmoco.embed(pretrained_run, [here, "photos/nosuch.jpg"], threads=1)
    with pytest.raises(DataError, match=r"/a.jpg: no such file \(2 such paths of 3\)"):
        fastmoco.embed(pretrained_run, ["a.jpg", here, here / "b.jpg"], threads=1)


def test_projection_and_unit_length(pretrained_run, stripes, tmp_path):
    assert embed(pretrained_run, stripes, tmp_path / "a.npz", "--features", "projection", "--normalise") == 0
    with np.load(tmp_path / "a.npz") as data:
        assert data["features"].shape == (52, RECIPE.dim) and "labels" not in data
        np.testing.assert_allclose(np.linalg.norm(data["features"], axis=1), 1, rtol=1e-5)


def test_parquet_or_a_clear_line(pretrained_run, stripes, tmp_path, capsys):
    code = embed(pretrained_run, stripes / "val", tmp_path / "a.parquet")
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        assert code == 2 and "pip install pyarrow" in capsys.readouterr().err
        return
    table = parquet.read_table(tmp_path / "a.parquet")
    assert code == 0 and table.column_names == ["file", "features", "label"] and table.num_rows == 12


def test_several_processes_are_refused(pretrained_run, stripes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert embed(pretrained_run, stripes / "val", tmp_path / "a.npz") == 2 and "one process" in capsys.readouterr().err


def test_mistakes_are_one_line(pretrained_run, stripes, tmp_path, capsys):
    (tmp_path / "taken.npz").write_text("mine")
    assert embed(pretrained_run, stripes, tmp_path / "taken.npz") == 2 and "exists" in capsys.readouterr().err
    assert embed(pretrained_run, stripes, tmp_path / "a.txt") == 2 and ".npz or .parquet" in capsys.readouterr().err
    assert embed(pretrained_run, tmp_path / "none", tmp_path / "a.npz") == 2
    assert not (tmp_path / "a.npz").exists() and (tmp_path / "taken.npz").read_text() == "mine"
