"""What headers tell: sizes of odd but valid files, reasons for bad ones, and never an exception."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from data.made_images import encode, write
from PIL import Image

from fastmoco.data.probe import Bytes, examine
from fastmoco.data.probe import probe as read_header
from fastmoco.options import DataScan
from fastmoco.recipe import MOST_PIXELS, Recipe

JPEG = encode()


def probe(*args: object, **options: object) -> tuple[int, int, str]:
    return read_header(*args, **options)[:3]


WITH_THUMBNAIL = JPEG[:2] + b"\xff\xe1" + (2 + 6 + len(JPEG)).to_bytes(2, "big") + b"Thumb\0" + JPEG + JPEG[2:]
BAD = {
    "empty file": b"",
    "GIF, which DALI cannot decode": encode("GIF"),
    "not an image": b"<html>not found</html>",
    "truncated": JPEG[:-2],
    "truncated ": JPEG[: len(JPEG) // 2],
    "truncated  ": JPEG[: len(JPEG) // 2] + b"\xff\x00\xff",
    "truncated   ": WITH_THUMBNAIL[:-100],
    "truncated    ": encode("PNG")[:-13],
    "truncated     ": encode("WEBP")[:-10],
    "truncated      ": JPEG[:2],
    "truncated       ": encode("PNG")[:20],
    "broken header": JPEG[:4] + JPEG[-2:],
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_files_are_left_out_with_the_reason(tmp_path: Path, reason: str) -> None:
    path = write(tmp_path / "x.jpg", BAD[reason])
    height, width, message = probe(str(path))
    assert (height, width) == (0, 0) and message == reason.rstrip()


EXIF = Image.Exif()
EXIF[0x0112] = 6
GOOD = {
    "plain": JPEG,
    "trailing garbage": JPEG + b"\0garbage" * 100,
    "thumbnail": WITH_THUMBNAIL,
    "long header": JPEG[:2] + (b"\xff\xe2\xff\xff" + bytes(65533)) * 3 + JPEG[2:],
    "progressive": encode(progressive=True),
    "grey": encode(mode="L"),
    "CMYK": encode(mode="CMYK"),
    "exif jpeg": encode(exif=EXIF),
    "exif png": encode("PNG", exif=EXIF),
    "exif webp": encode("WEBP", exif=EXIF),
    "rotated tiff": encode("TIFF", tiffinfo={274: 6}),
    "png garbage": encode("PNG") + b"more",
    "palette png": encode("PNG", mode="P"),
    "16 bit png": encode("PNG", mode="I;16"),
    "RGBA png": encode("PNG", mode="RGBA"),
    "webp": encode("WEBP"),
    "bmp": encode("BMP"),
    "jpeg 2000": encode("JPEG2000"),
    "ppm": encode("PPM"),
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("name", ["x.jpg", "odd name without ending"])
def test_odd_but_valid_files_are_told_by_content(tmp_path: Path, kind: str, name: str) -> None:
    assert probe(str(write(tmp_path / name, GOOD[kind]))) == (48, 64, "")


def test_images_over_the_pixel_limit(tmp_path: Path) -> None:
    path = str(write(tmp_path / "x.jpg", JPEG))
    assert probe(path, max_pixels=64 * 48) == (48, 64, "")
    assert probe(path, max_pixels=64 * 48 - 1) == (0, 0, "64 x 48 pixels, over the limit of 3071")
    header = bytearray(JPEG)
    start = header.index(b"\xff\xc0") + 5
    header[start : start + 4] = b"\xea\x60\xea\x60"  # 60000 x 60000
    assert (
        probe(str(write(tmp_path / "huge.jpg", bytes(header))))[2]
        == "60000 x 60000 pixels, over the limit of 100000000"
    )


@pytest.mark.filterwarnings("ignore")
def test_random_damage_never_raises(tmp_path: Path) -> None:
    generator, path = random.Random(0), tmp_path / "x"
    for trial in range(600):
        data = bytearray(generator.choice(list(GOOD.values())))
        for _ in range(generator.randint(1, 12)):
            data[generator.randrange(min(len(data), 400))] = generator.randrange(256)
        height, width, reason = probe(str(write(path, bytes(data[: generator.randint(1, len(data))]))))
        assert (height > 0 and width > 0) != bool(reason), trial


@pytest.mark.parametrize("kind", [*GOOD, *BAD])
def test_a_member_of_an_archive_is_told_as_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    data = GOOD.get(kind, BAD.get(kind))
    alone = probe(str(write(tmp_path / "alone", data)))
    path = write(tmp_path / "archive", b"before" * 100 + data + b"\xff\xd9 after" * 100)
    assert probe(str(path), 600, len(data)) == alone
    if kind == "long header":  # the control: another offset
        assert probe(str(path), 599, len(data))[2] == "not an image"


def test_a_bmp_without_all_its_rows_is_truncated(tmp_path: Path) -> None:
    for mode in ("RGB", "L", "P", "1"):
        whole = encode("BMP", mode=mode)
        assert probe(str(write(tmp_path / "x", whole))) == (48, 64, "")
        assert probe(str(write(tmp_path / "x", whole[:-1]))) == (0, 0, "truncated")


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        (JPEG, False),
        (JPEG + b"trailing garbage", False),
        (WITH_THUMBNAIL, False),
        (JPEG[:-2], True),
        (JPEG[: len(JPEG) // 2], True),
        (WITH_THUMBNAIL[:-2], True),  # the thumbnail's own end is none of the image's
        (b"", False),
    ],
)
def test_a_jpeg_without_its_end_is_noticed_in_memory(data: bytes, cut: bool) -> None:
    assert (examine(Bytes.of(np.frombuffer(data, np.uint8))).reason == "truncated") is cut


def test_a_limit_of_pixels_that_pillow_would_not_read_is_refused() -> None:
    for make in (lambda limit: Recipe(max_pixels=limit), lambda limit: DataScan(Path(), max_pixels=limit)):
        make(MOST_PIXELS)
        for wrong in (0, MOST_PIXELS + 1):
            with pytest.raises(ValueError, match="max.pixels is .*: use a whole number from 1"):
                make(wrong)
    # Pillow's own limit, at which it reads no header: a library's change of mind is noticed here.
    assert MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_without_dali_the_module_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the wheels of CUDA have a package `nvidia` of their own, in which a name could be looked for."""
    (tmp_path / "nvidia" / "cublas").mkdir(parents=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(each for each in sys.path if "site-packages" not in each)])
    path = write(tmp_path / "a.jpg", JPEG)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'nvidia\.nvimgcodec'"):
        read_header(path)
