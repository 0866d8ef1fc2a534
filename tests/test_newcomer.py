"""What a newcomer meets first: few lines before the useful one, remedies that name flags, no folder after a mistake."""

import gzip
import importlib.util
import io
import tarfile
import zipfile

import pytest

from fastmoco.cli import main


def test_a_start_says_only_what_differs_from_its_preset(images, flags, tmp_path, capsys):
    where = ["--data", str(images), "--out", str(tmp_path / "run"), "--device=cpu", "--threads=1", "--stop-after=1"]
    assert main(["pretrain", "demo", *flags, *where, "--no-knn"]) == 0
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    first = next(number for number, line in enumerate(lines) if "40 images, 5 steps an epoch" in line)
    assert first <= 2 and "width 0.125" in lines[0] and "temperature" not in lines[0], lines


@pytest.mark.parametrize(("flag", "package"), [("--track=wandb", "wandb"), ("--track=trackio", "trackio")])
def test_a_tracker_that_is_not_installed_leaves_no_run(images, flags, tmp_path, capsys, flag, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    argv = ["pretrain", "demo", *flags, "--data", str(images), "--out", str(tmp_path / "run"), "--device=cpu", flag]
    for _ in range(2):  # the same command is not refused because of what the first one left
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert package in said and "exists" not in said and not (tmp_path / "run").exists()


def test_what_is_missing_is_named_as_a_flag(tmp_path, capsys):
    assert main(["embed", str(tmp_path), "--out", "f.npz"]) == 2
    assert "--data is missing: name the images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.zip"])
def test_an_archive_of_another_kind_is_to_be_unpacked(tmp_path, capsys, name):
    whole = io.BytesIO()
    if name.endswith("zip"):
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("x.jpg", bytes(99))
    else:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("x.jpg"))
    data = whole.getvalue() if name.endswith("zip") else gzip.compress(whole.getvalue())
    (tmp_path / name).write_bytes(data + bytes(4))
    assert main(["data", "scan", str(tmp_path / name)]) == 2
    assert "is compressed: unpack it to a plain tar" in capsys.readouterr().err
