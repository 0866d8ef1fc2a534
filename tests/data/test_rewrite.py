"""Files that decoders misread, from scan to pixels: pixel types, metadata, number ranges, transparency."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data import odd_images as odd
from data.odd_images import COLOURS, HEIGHT, RAMP, WIDTH
from PIL import Image

from fastmoco.cli import main
from fastmoco.data import full_scan, pipeline
from fastmoco.data import request as requests
from fastmoco.data.full_scan import decode_apart
from fastmoco.data.loader import EvaluationLoader
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.probe import Bytes, examine
from fastmoco.data.rewrite import DamagedImage, Reading, compose, rewritten
from fastmoco.recipe import Recipe, RecipeError

GREY = np.repeat((RAMP * 255).round()[..., None], 3, 2)


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def decoded(data: bytes, **fields: object) -> np.ndarray:
    """The pixels that DALI makes of a file as a recipe with `fields` reads it."""
    recipe = Recipe(**fields)
    header = examine(Bytes.of(array(data)))
    assert not header.reason, header
    request = requests.Request(
        ["x"], [rewritten(array(data), Reading.of(recipe))], np.array([header[:2]]), np.empty((0, 1, 4), np.int32)
    )
    feed = pipeline._Feed(requests.small_parts(iter([request])), pipeline._encoded)
    build = pipeline._dali(1, 1, None, 1, pipeline._decode_graph, feed)
    build.schedule_run()
    return np.array(build.share_outputs()[0][0]).astype(float)


# Legal, but DALI has no name for their pixels, or no decoder.
REFUSED = {
    "int32": odd.tiff((RAMP * (2**31 - 1)).astype(np.int32)),
    "uint32": odd.tiff((RAMP * 2**31).astype(np.uint32)),
    "int16": odd.tiff((RAMP * 2**15 - 1).astype(np.int16)),
    "int8": odd.tiff((RAMP * 127).astype(np.int8)),
    "float16": odd.tiff(RAMP.astype(np.float16)),
    "float64 rgb": odd.tiff(COLOURS / 255),
    "bmp 555": odd.bmp_555(),
    "no bits": odd.tiff(np.packbits(RAMP > 0.5, axis=1), bits=0),
}


def test_unnamed_pixel_types_are_left_out_at_the_scan_and_never_decoded(tmp_path: Path) -> None:
    for name, data in REFUSED.items():
        (tmp_path / f"{name}.img").write_bytes(data)
    (tmp_path / "good.img").write_bytes(odd.encoded(COLOURS, "JPEG"))
    quick, full = scan(tmp_path, cache=False), scan(tmp_path, cache=False, decode=decode_apart)
    for results in (quick, full):
        assert results.paths == ["good.img"]
        assert [path for path, _ in results.rejected] == sorted(f"{name}.img" for name in REFUSED)
    reasons = dict(quick.rejected)
    assert reasons["int32.img"] == "pixels of type int32, which DALI cannot decode"
    assert reasons["no bits.img"] == "broken header"
    for name, data in REFUSED.items():  # the same at run time, where the file was another at the scan
        assert requests.fault(array(data), (HEIGHT, WIDTH)) == reasons[f"{name}.img"]


BILEVEL = (RAMP > 0.5).astype(np.uint8)
WITHOUT_BITS = {
    "black is 0": odd.tiff(np.packbits(BILEVEL, axis=1), bits=0),
    "rgb": odd.tiff(COLOURS, bits=0),
    "grey of eight bits": odd.tiff(COLOURS[..., 0].copy(), bits=0),
}


@pytest.mark.parametrize("kind", WITHOUT_BITS)
def test_both_scans_and_a_run_agree_on_a_tiff_that_does_not_say_its_bits(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(WITHOUT_BITS[kind])
    (tmp_path / "good.img").write_bytes(odd.encoded(COLOURS, "JPEG"))
    quick, full = scan(tmp_path, cache=False), scan(tmp_path, cache=False, decode=pipeline.undecodable)
    assert quick.paths == full.paths and quick.rejected == full.rejected
    assert bool(requests.fault(array(WITHOUT_BITS[kind]), (HEIGHT, WIDTH))) == (len(quick) == 1)


def test_where_dali_names_no_image_it_is_found_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before: without the guard DALI ends with an error that names nobody."""
    images = [array(odd.encoded(COLOURS, "PNG"))] * 5
    images[3] = array(REFUSED["float64 rgb"])
    request = requests.Request(list("abcde"), images, np.full((5, 2), 48), np.empty((0, 5, 4), np.int32))
    feed = pipeline._Feed(iter(()), pipeline._encoded)
    feed.pending.append(requests.Part(request, 0, 5))
    unnamed = RuntimeError("Invalid sample_type: 16397")
    assert pipeline._faults(pytest.fail, feed, unnamed, None) == {3: "damaged: cannot be decoded"}
    feed.pending[0] = requests.Part(request.rows(slice(0, 3)), 0, 3)
    with pytest.raises(RuntimeError, match="Invalid sample_type"):  # no image is to blame
        pipeline._faults(pytest.fail, feed, unnamed, None)


MASKS = {
    "4-4-4": odd.bmp_of_masks(16, (0xF00, 0xF0, 0xF)),
    "5-5-5-1": odd.bmp_of_masks(16, (0x7C00, 0x3E0, 0x1F, 0x8000), 108),
    "5-6-5": odd.bmp_of_masks(16, (0xF800, 0x7E0, 0x1F)),
    "5-6-5, V5": odd.bmp_of_masks(16, (0xF800, 0x7E0, 0x1F), 124),
    "10-10-10": odd.bmp_of_masks(32, (0x3FF00000, 0xFFC00, 0x3FF)),
    "red last": odd.bmp_of_masks(32, (0xFF, 0xFF00, 0xFF0000)),
    "red last, V4": odd.bmp_of_masks(32, (0xFF, 0xFF00, 0xFF0000), 108),
    "8-8-8": odd.bmp_of_masks(32, (0xFF0000, 0xFF00, 0xFF)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_bmp_of_masks_is_named_or_right(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(MASKS[kind])
    (tmp_path / "good.img").write_bytes(odd.encoded(COLOURS, "JPEG"))
    found = scan(tmp_path, cache=False, decode=pipeline.undecodable)
    if found.paths == ["good.img"]:
        assert found.rejected[0][1].startswith(("damaged", "pixels of type", "BMP of colour masks"))
    else:
        assert np.abs(decoded(MASKS[kind]) - COLOURS).max() <= 255 / 15
    assert kind not in ("5-6-5", "8-8-8", "red last, V4") or len(found) == 2, "which DALI reads right"


TEXT = b"Comment\0\0" + b"x" * 70_000
GOOD = {
    "long text": odd.png(COLOURS, (b"iTXt", b"Comment\0\0\0\0\0" + b"y" * 3_000_000)),
    "long packed text": odd.png(COLOURS, (b"zTXt", b"Comment\0\0" + zlib.compress(b"y" * 2_000_000))),
    "profile that is none": odd.png(COLOURS, (b"iCCP", b"x\0\0" + zlib.compress(b"nonsense" * 20))),
    "text": odd.png(COLOURS, (b"tEXt", TEXT)),
    "bad crc of pHYs": odd.png(COLOURS, (b"pHYs", b"\0\0\0\1\0\0\0\1\0"), bad_crc=True),
    "bad crc of tIME": odd.png(COLOURS, (b"tIME", b"\7\xe9\1\1\0\0\0"), bad_crc=True),
    "bad crc of gAMA": odd.png(COLOURS, (b"gAMA", b"\0\1\x86\xa0"), bad_crc=True),
    "five channels": odd.tiff(np.concatenate([COLOURS, COLOURS[..., :2]], 2)),
    "jpeg 2000": odd.encoded(COLOURS, "JPEG2000"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_images_with_odd_metadata_are_used(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "x.img").write_bytes(GOOD[kind])
    assert scan(tmp_path, cache=False, decode=pipeline.undecodable).paths == ["x.img"]
    assert np.array_equal(decoded(GOOD[kind]), COLOURS)
    assert "libpng" not in capfd.readouterr().err


# Name: file, whether its header states the range, fields of the recipe that say it.
RANGES = {
    "pgm of 100": (odd.pnm(5, 100), True, {}),
    "ascii pgm of 15": (odd.pnm(2, 15), True, {}),
    "pgm of 4095": (odd.pnm(5, 4095), True, {}),
    "float to 255": (odd.tiff((RAMP * 255).astype(np.float32)), False, {"value_range": (0, 255)}),
    "12 bits in 16": (odd.tiff((RAMP * 4095).round().astype(np.uint16)), False, {"value_range": (0, 4095)}),
    "14 bits in a PNG": (
        odd.encoded((RAMP * 16383).round().astype(np.uint16), "PNG"),
        False,
        {"value_range": (0, 16383)},
    ),
    "floats around 0": (odd.tiff((RAMP * 2 - 1).astype(np.float32)), False, {"value_range": (-1, 1)}),
    "8 bits, 16 levels": (odd.encoded((RAMP * 15).round().astype(np.uint8), "PNG"), False, {"value_range": (0, 15)}),
}


@pytest.mark.parametrize("kind", RANGES)
def test_numbers_that_do_not_span_their_type(kind: str, tmp_path: Path) -> None:
    data, stated, fields = RANGES[kind]
    levels = 255 / 15 if "15" in kind or "16 levels" in kind else 255 / 100 if "100" in kind else 1
    assert np.abs(decoded(data, **fields) - GREY).max() <= levels / 2 + 1.01
    # The control: taken for what the type can hold, they are another picture.
    if "ascii" not in kind:  # whose largest number DALI's decoder looks at
        assert np.abs(decoded(data, value_range="container") - GREY).mean() > 25
    (tmp_path / "x.img").write_bytes(data)
    (tmp_path / "y.jpg").write_bytes(odd.encoded(COLOURS, "JPEG"))
    spans = scan(tmp_path, cache=False, decode=pipeline.undecodable).spans
    assert spans[1] > 200 and (spans[0] > 200 if stated or kind == "floats around 0" else spans[0] <= 64)


def test_a_ppm_of_colours_with_another_largest_number() -> None:
    for kind, most in ((6, 4095), (3, 200)):
        assert np.abs(decoded(odd.pnm(kind, most)) - COLOURS).max() <= 255 / most / 2 + 0.51
    assert isinstance(rewritten(array(odd.pnm(6, 4095)[:-10]), Reading()), DamagedImage)


def with_garbage(compression: int, content: bytes) -> bytes:
    """A TIFF that says how its pixels are compressed, and holds something else."""
    return tiff_of(compression, content.ljust(400, b"\x5a"))


def tiff_of(compression: int, content: bytes, side: int = 16) -> bytes:
    tags = [(256, side), (257, side), (258, 8), (259, compression), (262, 1), (273, 0), (277, 1), (278, side)]
    tags += [(279, len(content))]
    at = 8 + 2 + 12 * len(tags) + 4
    short = (258, 259, 262, 277)
    rows = b"".join(
        struct.pack("<HHII", tag, 3 if tag in short else 4, 1, at if tag == 273 else value) for tag, value in tags
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4) + content


NOISE = COLOURS.copy()
NOISE[..., 2] = np.random.default_rng(0).integers(0, 255, NOISE.shape[:2])
LZW = odd.encoded(NOISE, "TIFF", compression="tiff_lzw")
BLACK = {
    "deflate": with_garbage(8, b"no stream"),
    "zstd": with_garbage(50000, b"no stream"),
    "unknown": with_garbage(65000, b"whatever"),
    "jpeg 2000 inside": with_garbage(34712, b"\xff\x4f\xff\x51"),
    "lzw with a byte changed": bytes((value ^ 255) if at == len(LZW) // 3 else value for at, value in enumerate(LZW)),
}


@pytest.mark.parametrize("kind", BLACK)
def test_a_compressed_tiff_that_cannot_be_read_is_no_black_picture(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bad.img").write_bytes(BLACK[kind])
    (tmp_path / "good.img").write_bytes(odd.encoded(COLOURS, "JPEG"))
    found = scan(tmp_path, cache=False, decode=pipeline.undecodable)
    assert found.paths == ["good.img"] and "decode" in found.rejected[0][1]
    # The control: DALI alone makes a picture of it, without an error.
    if kind != "lzw with a byte changed":
        control = with_dali_alone(BLACK[kind])
        assert control.max() == 0


def with_dali_alone(data: bytes) -> np.ndarray:
    request = requests.Request(["x"], [array(data)], np.array([[16, 16]]), np.empty((0, 1, 4), np.int32))
    feed = pipeline._Feed(requests.small_parts(iter([request])), pipeline._encoded)
    build = pipeline._dali(1, 1, None, 1, pipeline._decode_graph, feed)
    build.schedule_run()
    return np.array(build.share_outputs()[0][0])


COMPRESSED = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "group4", "deep", "by hand")


@pytest.mark.parametrize("how", COMPRESSED)
def test_compressed_tiffs_are_read(how: str) -> None:
    grey = (RAMP * 65535).astype(np.uint16)
    data = {
        "group4": lambda: odd.encoded(COLOURS[..., 0] > 127, "TIFF", compression="group4"),
        "deep": lambda: odd.encoded(grey, "TIFF", compression="tiff_adobe_deflate"),
        "by hand": lambda: tiff_of(8, zlib.compress(bytes(range(256)))),
    }.get(how, lambda: odd.encoded(COLOURS, "TIFF", compression=how))()
    assert not isinstance(rewritten(array(data), Reading()), DamagedImage)
    assert decoded(data).std() > 20


ALPHA = (RAMP * 255).round().astype(np.uint8)
RGBA = np.concatenate([COLOURS, ALPHA[..., None]], 2)
LEVEL = Image.fromarray(COLOURS).convert("L")
TRANSPARENT = {
    "png": odd.encoded(RGBA, "PNG"),
    "webp": odd.encoded(RGBA, "WEBP", lossless=True, exact=True),
    "tiff": odd.encoded(RGBA, "TIFF"),
    "jpeg 2000": odd.encoded(RGBA, "JPEG2000"),
}


def over(colour: int) -> np.ndarray:
    alpha = ALPHA[..., None] / 255
    return COLOURS * alpha + colour * (1 - alpha)


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_images_are_shown_over_a_colour(kind: str, tmp_path: Path) -> None:
    data = TRANSPARENT[kind]
    assert np.abs(decoded(data) - over(255)).max() <= 0.51  # white, and rounding
    assert np.abs(decoded(data, background="#000000") - over(0)).max() <= 0.51
    # The control: what lies under transparency shows.
    assert np.array_equal(decoded(data, background="ignore"), COLOURS)
    (tmp_path / "x.img").write_bytes(data)
    (tmp_path / "y.img").write_bytes(odd.encoded(COLOURS, "PNG"))
    assert scan(tmp_path, cache=False).transparent == 1


def test_one_transparent_level_or_palette_entry() -> None:
    grey = np.array(LEVEL)
    one = odd.encoded(grey, "PNG", transparency=int(grey[0, 0]))
    assert np.array_equal(decoded(one)[..., 0], np.where(grey == grey[0, 0], 255, grey))
    deep = (grey.astype(np.uint16) * 257).astype(np.uint16)
    sixteen = odd.png(deep, (b"tRNS", int(deep[0, 0]).to_bytes(2, "big")))
    assert np.array_equal(decoded(sixteen)[..., 0], np.where(grey == grey[0, 0], 255, grey))
    both = np.stack([grey, ALPHA], 2)
    expected = np.round(grey * (ALPHA / 255) + 255 - ALPHA)
    assert np.abs(decoded(odd.encoded(both, "PNG"))[..., 1] - expected).max() <= 1
    palette = Image.fromarray(COLOURS).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=3)
    data = buffer.getvalue()
    where = np.array(palette) == 3
    assert where.any() and (decoded(data)[where] == 255).all() and (decoded(data, background="black")[where] == 0).all()


def test_extra_channels_that_are_not_transparency_change_nothing() -> None:
    data = odd.tiff(RGBA)  # an extra sample of no stated meaning
    assert np.array_equal(decoded(data), COLOURS)


def test_composing_rounds_to_the_nearest_level() -> None:
    pixels, alpha = (
        np.full((256, 256, 3), np.arange(256, dtype=np.uint8)[:, None, None]),
        np.zeros((256, 256), np.uint8),
    )
    alpha[:] = np.arange(256)
    exact = (pixels[..., 0] * alpha.astype(float) + 51 * (255.0 - alpha)) / 255
    assert np.abs(compose(pixels, alpha, (51, 51, 51))[..., 0] - exact).max() <= 0.5


def test_damage_in_what_is_rewritten_is_named() -> None:
    cut = TRANSPARENT["png"]
    at = cut.index(b"IDAT") + 30
    for data in (cut[:at] + bytes(40) + cut[at + 40 :], GOOD["jpeg 2000"][:-400]):
        broken = rewritten(array(data), Reading())
        assert isinstance(broken, DamagedImage) and requests.fault(broken, (HEIGHT, WIDTH)) == str(broken)


def test_a_loader_shows_what_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(odd.encoded(np.full((32, 32, 4), (200, 0, 0, 0), np.uint8), "PNG"))
    images = scan(tmp_path, cache=False)
    for background, level in (("white", 255), ("gray", 128), ("ignore", None)):
        recipe = Recipe(crop_size=32, background=background)
        with EvaluationLoader(images, recipe, torch.device("cpu")) as loader:
            ((crops, _),) = loader
        expected = torch.tensor([200, 0, 0] if level is None else [level] * 3, dtype=torch.uint8)
        assert (crops == expected).all()


def test_runs_from_before_there_was_a_background_keep_their_pixels() -> None:
    old = {name: value for name, value in Recipe().as_dict().items() if name not in ("background", "value_range")}
    recipe = Recipe.from_dict(json.loads(json.dumps(old)))
    assert (recipe.background, recipe.value_range) == ("ignore", "container")
    new = Recipe(background="#10ff00", value_range=(0, 4095))
    assert Recipe.from_dict(json.loads(json.dumps(new.as_dict()))) == new
    for fields in ({"background": "pink"}, {"background": "#12345"}, {"value_range": (5, 5)}, {"value_range": (1, 0)}):
        with pytest.raises(RecipeError, match=next(iter(fields))):
            Recipe(**fields)


def test_a_scan_says_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(TRANSPARENT["png"])
    (tmp_path / "b.tif").write_bytes(RANGES["float to 255"][0])
    (tmp_path / "c.tif").write_bytes(RANGES["12 bits in 16"][0])
    (tmp_path / "d.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "e.svg").write_bytes(b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>')
    assert main(["data", "scan", str(tmp_path), "--full"]) == 0
    output = capsys.readouterr().out
    for text in (
        "1 with transparency",
        "1 nearly one colour, as b.tif",
        "1 use at most 64 of 255 levels, as c.tif",
        "--value-range",
        "HEIC, which DALI cannot decode",
        "SVG, which DALI cannot decode",
    ):
        assert text in output, output
    assert main(["data", "scan", str(tmp_path), "--full", "--value-range", "0", "4095"]) == 0
    assert "levels, as c.tif" not in capsys.readouterr().out


CRASHING = """
import os, signal, sys
from fastmoco.data import pipeline
honest = pipeline._decode_graph
def undecodable(images, *rest):
    for i, path in enumerate(images.paths):
        if "crash" in path: os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in path: signal.pause()
        yield pipeline.CheckResult("", 7)
"""


def test_a_decoder_that_crashes_or_hangs_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:02d}{' crash' if i in (3, 4) else ' hang' if i == 9 else ''}.jpg" for i in range(20)]
    images = Manifest(str(tmp_path), names, np.full((20, 2), 48, np.int32))
    (tmp_path / "child.py").write_text(
        f"{CRASHING}\nfrom fastmoco.data import full_scan\nimport json\n"
        "pipeline.undecodable = undecodable\nfull_scan.main(json.loads(sys.argv[1]))\n"
    )
    monkeypatch.setattr(full_scan, "CHILD", [sys.executable, str(tmp_path / "child.py")])
    monkeypatch.setattr(full_scan, "PATIENCE", 8.0)
    results = list(decode_apart(images))
    assert len(results) == 20
    assert [c.reason for c in results if c.reason] == ["the decoder crashed (SIGSEGV)"] * 2 + [
        "the decoder does not end within 8 s"
    ]
    assert [i for i, c in enumerate(results) if c.reason] == [3, 4, 9]
    # The control: a bug of ours is no crash of a decoder.
    monkeypatch.setattr(full_scan, "CHILD", [sys.executable, "-c", "raise RuntimeError('a bug')"])
    with pytest.raises(RuntimeError, match="a bug"):
        list(decode_apart(images))


def test_scans_need_no_dali_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(odd.encoded(COLOURS, "JPEG"))
    code = "import sys; from fastmoco.cli import main; main(['data', 'scan', sys.argv[1]]); print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (
        "nvidia.nvimgcodec" in result.stdout and "nvidia.dali" not in result.stdout and "'torch'" not in result.stdout
    )
