"""2,000 files with mutated headers and bodies end no command: no signal, no traceback, no hang.

Twelve formats, through a scan of headers, a full scan and one epoch, each in a process of its own.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data import odd_images as odd
from PIL import Image

COUNT, GOOD = 2000, 200
PIXELS = odd.COLOURS.copy()
PIXELS[..., 2] = np.random.default_rng(0).integers(0, 255, PIXELS.shape[:2])
DEEP = PIXELS[..., 0].astype(np.uint16) * 257
FORMATS = {
    "jpeg": odd.encoded(PIXELS, "JPEG"),
    "progressive": odd.encoded(PIXELS, "JPEG", progressive=True),
    "png": odd.encoded(PIXELS, "PNG"),
    "png of 16 bits": odd.encoded(DEEP, "PNG"),
    "palette": odd.encoded(np.array(Image.fromarray(PIXELS).quantize(64)), "PNG"),
    "rgba": odd.encoded(np.dstack([PIXELS, PIXELS[..., 0]]), "PNG"),
    "webp": odd.encoded(PIXELS, "WEBP"),
    "webp lossless": odd.encoded(np.dstack([PIXELS, PIXELS[..., 0]]), "WEBP", lossless=True),
    "bmp": odd.encoded(PIXELS, "BMP"),
    "tiff": odd.tiff(DEEP),
    "tiff lzw": odd.encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    "jpeg 2000": odd.encoded(PIXELS, "JPEG2000"),
    "pgm": odd.pnm(5, 200),
}


def mutated(generator: random.Random, data: bytearray) -> bytes:
    """Bytes changed in the header, anywhere, or to extremes; turned round; or cut."""
    kind, head = generator.randrange(5), min(len(data), 300)
    if kind == 4:
        return bytes(data[: generator.randint(1, len(data))])
    if kind == 3:
        first = generator.randrange(len(data))
        last = min(len(data), first + generator.randint(1, 64))
        data[first:last] = data[first:last][::-1] + bytes(generator.randint(0, 9))
        return bytes(data)
    for _ in range(generator.randint(1, 30 if kind == 1 else 8)):
        place = generator.randrange(len(data) if kind == 1 else head)
        data[place] = generator.choice((0, 1, 127, 128, 255)) if kind == 2 else generator.randrange(256)
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and good ones among them that take the places of the bad."""
    root, generator = tmp_path_factory.mktemp("fuzz"), random.Random(0)
    for number in range(COUNT):
        name = list(FORMATS)[number % len(FORMATS)]
        (root / f"{number:05d} {name}.img").write_bytes(mutated(generator, bytearray(FORMATS[name])))
        if number % (COUNT // GOOD) == 0:
            (root / f"{number:05d} good.jpg").write_bytes(FORMATS["jpeg"])
    return root


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess:
    here = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=here, timeout=1500)


EPOCH = (
    "pretrain demo --epochs 1 --max-bad-share 1 --batch-size 32 --bn-group 8 --width 0.125 --crop-size 16 "
    "--queue-size 64 --no-knn --device cpu --threads 2 --save-minutes 0"
)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("command", ["data scan", "data scan --full", EPOCH], ids=["scan", "full scan", "one epoch"])
def test_no_file_ends_a_command(command: str, folder: Path, tmp_path: Path) -> None:
    where = (str(folder),) if command.startswith("data") else ("--data", str(folder), "--out", str(tmp_path / "run"))
    result = run(tmp_path, "-m", "fastmoco", *command.split(), *where)
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    assert "Traceback" not in result.stderr and "Fatal" not in result.stderr
    assert "crashed" not in result.stdout  # not even in the child of a full scan


UNGUARDED = """
import sys
import numpy as np
from fastmoco.data import pipeline, request
from fastmoco.data.manifest import Manifest
request.fault = lambda data, size: ""
pipeline._find_by_halves = lambda part, positions: None
root = sys.argv[1]


def manifest(names):
    return Manifest(root, names, np.full((len(names), 2), 48, np.int32))


listed = manifest(sys.argv[2:])
names = [name for i, name in enumerate(listed.paths) if isinstance(request.read(listed, i), np.ndarray)]
list(pipeline.undecodable(manifest(names)))
"""


@pytest.mark.slow
def test_without_the_guard_these_files_end_the_process(folder: Path, tmp_path: Path) -> None:
    """The control: the same files, but nobody asks the header's parser before DALI decodes."""
    result = run(tmp_path, "-c", UNGUARDED, str(folder), *sorted(path.name for path in folder.iterdir()))
    assert result.returncode != 0, "ended as if nothing were wrong"


@pytest.mark.slow
def test_without_the_guard_one_file_ends_the_process(tmp_path: Path) -> None:
    """A control of the control: a good file alone does not."""
    (tmp_path / "b int32.tif").write_bytes(odd.tiff((odd.RAMP * (2**31 - 1)).astype(np.int32)))
    (tmp_path / "a good.jpg").write_bytes(FORMATS["jpeg"])
    good = run(tmp_path, "-c", UNGUARDED, str(tmp_path), "a good.jpg")
    bad = run(tmp_path, "-c", UNGUARDED, str(tmp_path), "a good.jpg", "b int32.tif")
    assert good.returncode == 0 and bad.returncode != 0
