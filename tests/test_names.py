"""Names of any bytes, through every command, in the C locale too: there Python takes all but ASCII for surrogates."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LATIN, UTF8, MARKUP, LINES = b"caf\xe9 %d.jpg", "été 日本 %d.jpg".encode(), b"<b>&amp; $%d$.jpg", b"two\nlines %d.jpg"
CLASSES = b"vers le b\xe2s", "横".encode()
EVERYTHING = """
import sys
from fastmoco.cli import main
data, run, out, labels, listed = sys.argv[1:]
train, val = data + "/train", data + "/val"
small = "--width 0.125 --crop-size 16 --batch-size 8 --bn-group 4 --queue-size 16 --epochs 1 --threads 1".split()
ends = "--device", "cpu"
for argv in (
    ["data", "scan", data, "--full", "--json", out + "/facts.json"],
    ["pretrain", "demo", "--data", data, "--out", run, *small, *ends],
    ["pretrain", "demo", "--resume", "--out", run, *ends],
    ["evaluate", "knn", run, *ends],
    ["evaluate", "linear", run, "--fast", "--epochs", "1", *ends],
    ["evaluate", "knn", run, "--data", train, "--val", val, "--labels", labels, *ends],
    ["embed", run, "--data", train, "--out", out + "/f.npz", *ends],
    ["embed", run, "--data", train, "--out", out + "/f.parquet", *ends],
    ["embed", run, "--data", listed, "--out", out + "/listed.npz", *ends],
    ["report", run],
    ["export", run, "--format", "safetensors", "--out", out + "/exported"],
):
    print("code", main(argv), *argv[:2], file=sys.stderr, flush=True)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of twelve training and four validation images, and a bad file, under names of any bytes."""
    random, root = np.random.RandomState(0), os.fsencode(tmp_path / "data")
    for side, count in ((b"train", 12), (b"val", 4)):
        for name in CLASSES:
            folder = b"/".join([root, side, name])
            os.makedirs(folder)
            for number in range(count):
                with open(folder + b"/" + (LATIN, UTF8, MARKUP, LINES)[number % 4] % number, "wb") as file:
                    Image.fromarray(random.randint(0, 255, (24, 24, 3), dtype=np.uint8)).save(file, "JPEG")
    (tmp_path / "data/train" / os.fsdecode(CLASSES[0]) / os.fsdecode(b"b\xffd.jpg")).write_bytes(b"no image")
    return tmp_path / "data"


def names_of(folder: Path) -> list[bytes]:
    found = (os.fsencode(path.relative_to(folder)) for path in folder.rglob("*.jpg") if b"\xff" not in bytes(path))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "utf-8:strict"}],
    ids=["C", "strict UTF-8"],
)
def test_every_command_takes_names_of_any_bytes(data: Path, tmp_path: Path, locale: dict[str, str]) -> None:
    train = names_of(data / "train")
    labels, listed = tmp_path / "labels.csv", tmp_path / "list.txt"
    with labels.open("w", newline="", errors="surrogateescape", encoding="utf-8") as file:
        rows = [(name.decode(errors="surrogateescape"), f"k{i % 2}") for i, name in enumerate(train)]
        rows += [(name.decode(errors="surrogateescape"), f"k{i % 2}") for i, name in enumerate(names_of(data / "val"))]
        csv.writer(file).writerows(dict(rows).items())
    one_line = [name for name in train if b"\n" not in name]
    listed.write_bytes(b"".join(b"data/train/" + name + b"\n" for name in one_line))
    places = map(str, (data, tmp_path / "run", tmp_path, labels, listed))
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, *places],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | locale,
        timeout=280,
    )
    said = done.stderr.decode(errors="backslashreplace")
    codes = [line.split()[1] for line in said.splitlines() if line.startswith("code ")]
    has_arrow = importlib.util.find_spec("pyarrow") is not None
    assert done.returncode == 0 and codes == ["0"] * 7 + ["0" if has_arrow else "2"] + ["0"] * 3, said
    assert "Traceback" not in said
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert facts["training"]["images"] == 24 and len(facts["training"]["left_out"]) == 1
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "<b>&amp; $" not in page and "&lt;b&gt;" in page
    if not locale.get("LC_ALL"):  # there NumPy's text is of surrogates
        assert sorted(map(os.fsencode, np.load(tmp_path / "f.npz")["files"].tolist())) == train
    assert len(np.load(tmp_path / "listed.npz")["files"]) == len(one_line)
    if has_arrow:
        import pyarrow.parquet as parquet

        column = parquet.read_table(tmp_path / "f.parquet")["file"].to_pylist()
        assert sorted(column) == train, "bytes, because one of them is no UTF-8"


def test_a_table_names_files_of_any_bytes_and_one_in_another_encoding_is_told(tmp_path: Path, capsys) -> None:
    from fastmoco.data.manifest import scan
    from fastmoco.evaluate.labels import label

    for name in (LATIN % 0, UTF8 % 1):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            Image.new("RGB", (8, 8)).save(file, "JPEG")
    table = tmp_path / "table.csv"
    table.write_bytes(LATIN % 0 + b",a\n" + UTF8 % 1 + b",b\n")
    assert label(scan(tmp_path), table).classes == ["a", "b"]
    table.write_bytes(LATIN % 0 + b",a\n" + "naïve.jpg,b\n".encode("latin-1"))
    assert len(label(scan(tmp_path), table)) == 1
    assert "1 line of" in (said := capsys.readouterr().err) and "line 2, na\\xefve.jpg, which is not UTF-8" in said
    table.write_bytes(LATIN % 0 + b",a\n" + "naïve.jpg,b\n".encode())  # the control: names that are not there may be
    assert len(label(scan(tmp_path), table)) == 1
