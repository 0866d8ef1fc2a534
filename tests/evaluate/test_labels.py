"""Labels from class folders and CSV files, and the line that says what is wrong with them."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastmoco.data import manifest
from fastmoco.data.manifest import DataError
from fastmoco.evaluate.labels import both_sides, label, one_side, read_table
from fastmoco.options import UsageError


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Six images in one folder, one of them below."""
    root = tmp_path_factory.mktemp("flat")
    (root / "deep").mkdir()
    for name in ("a", "b", "c", "d", "e", "deep/f"):
        Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(root / f"{name}.png")
    return root


def table(folder, text: str):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_names_classes_by_path_or_by_name(flat, tmp_path):
    text = '\ufefffile,class\n./a.png,cat\nb.png," dog "\nf.png,cat\n"c.png",dog,ignored\n\n'
    images = label(manifest.scan(flat), table(tmp_path, text))
    assert dict(zip(images.paths, (images.classes[i] for i in images.labels))) == {
        "a.png": "cat",
        "b.png": "dog",
        "c.png": "dog",
        "deep/f.png": "cat",
    }
    assert images.sizes.tolist() == [[8, 9]] * 4 and len(images) == 4


def test_the_training_part_numbers_the_classes(flat, tmp_path):
    images = manifest.scan(flat)
    actual = label(images, table(tmp_path, "a.png,dog\n"), ["cat", "dog"])
    assert actual.labels.tolist() == [1] and actual.classes == ["cat", "dog"]
    with pytest.raises(DataError, match="'wolf' is not among the 2 classes"):
        label(images, table(tmp_path, "a.png,wolf\n"), ["cat", "dog"])


def test_mistakes_in_a_table(flat, tmp_path):
    with pytest.raises(DataError, match="names none of the 6 images"):
        label(manifest.scan(flat), table(tmp_path, "x.png,cat\n"))
    with pytest.raises(UsageError, match="line 2 has one column"):
        read_table(table(tmp_path, "a.png,cat\nb.png\n"))
    (tmp_path / "bin.csv").write_bytes(b"\xff\xfe\x00a,\x80")
    with pytest.raises(UsageError, match="cannot be read as CSV"):
        read_table(tmp_path / "bin.csv")


def test_a_subset_keeps_paths_sizes_and_labels_together(flat, tmp_path):
    images = label(manifest.scan(flat), table(tmp_path, "a.png,x\nb.png,y\nc.png,x\n"))
    some = images.take([2, 0])
    assert some.paths == ["c.png", "a.png"] and some.labels.tolist() == [0, 0] and len(images) == 3


def test_a_subset_of_an_archive_reads_its_own_images(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for shade in (10, 60, 110, 160):
            Image.fromarray(np.full((8, 9, 3), shade, np.uint8)).save(tmp_path / f"{shade:03d}.png")
            archive.add(tmp_path / f"{shade:03d}.png", f"{shade:03d}.png")
    images = label(manifest.scan(tmp_path / "images.tar"), table(tmp_path, "060.png,x\n160.png,y\n"))
    shades = [int(np.asarray(Image.open(io.BytesIO(images.read(index).tobytes())))[0, 0, 0]) for index in (0, 1)]
    assert images.paths == ["060.png", "160.png"] and shades == [60, 160]


def test_images_that_stand_on_both_sides_are_told(flat, tmp_path, capsys):
    names = table(tmp_path, "a.png,x\nb.png,y\nf.png,x\n")
    both_sides(tmp_path, flat, flat, names)
    assert "warning: 3 of the 3 validation images train, too" in capsys.readouterr().err
    both_sides(tmp_path, flat, flat / "deep", names)  # the control: another folder
    (tmp_path / "one.txt").write_text(f"{flat}/a.png\n{flat}/c.png\n")
    (tmp_path / "two.txt").write_text(f"{flat}/b.png\n")
    both_sides(tmp_path, tmp_path / "one.txt", tmp_path / "two.txt", table(tmp_path, "a.png,x\nc.png,y\nb.png,x\n"))
    assert "warning" not in capsys.readouterr().err


def test_both_sides(flat, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"options": {"data": str(flat)}}))
    with pytest.raises(UsageError, match="one image of each class: .*--val PATH"):
        both_sides(tmp_path, None, None, table(tmp_path, "a.png,x\nb.png,y\n"))
    with pytest.raises(UsageError, match="--labels FILE.csv"):
        both_sides(tmp_path, None, flat, None)
    train, val = both_sides(tmp_path, None, flat, table(tmp_path, "a.png,x\nb.png,y\n"))
    assert train.classes == val.classes == ["x", "y"] and len(val) == 2
    (tmp_path / "recipe.json").write_text(json.dumps({"options": {"data": None}}))
    with pytest.raises(UsageError, match="--data PATH"):
        both_sides(tmp_path, None, flat, None)
    with pytest.raises(UsageError, match="has no classes"):
        one_side(flat, None, ["x", "y"])


def test_without_images_to_validate_a_fifth_of_each_class_is_set_aside(tmp_path, capsys):
    for name, count in (("a", 10), ("b", 5)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / f"images/{name}/{number}.png")
    train, val = both_sides(tmp_path, tmp_path / "images", None, None)
    assert np.bincount(train.labels).tolist() == [8, 4] and np.bincount(val.labels).tolist() == [2, 1]
    assert not set(train.paths) & set(val.paths) and train.classes == val.classes == ["a", "b"]
    assert "3 of the 15 images validate and do not train" in capsys.readouterr().err
    assert both_sides(tmp_path, tmp_path / "images", None, None)[1].paths == val.paths
    capsys.readouterr()
    (tmp_path / "images").rename(tmp_path / "train")  # the control: where there is a val/, it is taken
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "val/b").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"val/{name}/9.png")
    train, val = both_sides(tmp_path, tmp_path, None, None)
    assert (len(train), len(val)) == (15, 2) and "note" not in capsys.readouterr().err


@pytest.fixture
def nested(tmp_path):
    """Images a/0000.png, a/0001.png and b/0000.png."""
    root = tmp_path / "nested"
    for name in ("a/0000.png", "a/0001.png", "b/0000.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\n0001.png,dog\n0000.png,cat\n", "line 3, 0000.png: may be a/0000.png and b/0000.png"),
        ("a/0000.png,cat\n0000,cat\n", "line 2, 0000: may be"),
        ("a/0000.png,cat\na/0000.png,dog\n", "line 2, a/0000.png: dog, but cat in line 1"),
        ("a/0001.png,cat\n0001.png,dog\n", "line 2, 0001.png: dog, but cat in line 1"),
        ("a/0000.png,cat\na/0001.png, \n", "line 2, a/0001.png: an empty cell"),
        ("id,path,label\n0000,a/0000.png,x\n", "line 2: its second column names an image"),
        ("label,path\ncat,a/0000.png\n", "line 2: its second column names an image"),
        ("a/0000.png,cat\n,dog\n", "line 2, 'dog': an empty cell"),
    ],
)
def test_a_table_that_is_ambiguous_is_refused_with_the_row(nested, tmp_path, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        label(manifest.scan(nested), table(tmp_path, text))


@pytest.mark.parametrize("form", ["{}", "{root}/{}", "nested/{}", "./{}"])
def test_rows_may_name_an_image_in_several_ways(nested, tmp_path, form):
    rows = [form.format(name, root=nested) for name in ("a/0000.png", "b/0000.png")]
    images = label(manifest.scan(nested), table(tmp_path, f"id,label\n{rows[0]},cat\n{rows[1]},dog\n"))
    assert images.paths == ["a/0000.png", "b/0000.png"] and images.labels.tolist() == [0, 1]
    windows = label(manifest.scan(nested), table(tmp_path, "a\\0001.png,cat\n"))
    assert windows.paths == ["a/0001.png"]
    assert label(manifest.scan(nested), table(tmp_path, "0001,cat\n0001.png,cat\n")).paths == ["a/0001.png"]


def test_what_a_table_says_beside_its_classes_is_noted(nested, tmp_path, capsys):
    rows = "image,c0,c1\na/0000.png,1.0,0.0\nb/0000.png,0.0,1.0\nA/0001.PNG,0.0,1.0\n"
    assert len(label(manifest.scan(nested), table(tmp_path, rows))) == 2
    said = capsys.readouterr().err
    assert "the first two columns are read, as path and class: image, c0" in said
    assert "1 line of" in said and "labels.csv names none" in said and "the first is line 4, A/0001.PNG" in said
    label(manifest.scan(nested), table(tmp_path, "path,label\na/0000.png,x\nb/0000.png,y\n"))
    assert capsys.readouterr().err == ""  # the control


def test_a_table_serves_the_side_that_has_no_classes(nested, flat, tmp_path):
    """As ImageNet comes: class folders to train on, and a flat folder with a table to validate."""
    train, val = both_sides(tmp_path, nested, flat, table(tmp_path, "a.png,b\nc.png,a\n"))
    assert train.classes == val.classes == ["a", "b"] and len(train) == 3
    assert val.paths == ["a.png", "c.png"] and val.labels.tolist() == [1, 0]
