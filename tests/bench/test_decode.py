"""One wrong image among many is noticed, whoever decodes, and a comparison that would not notice says so."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmoco.bench import decode
from fastmoco.bench.decode import AGAIN, CONTROL, SAME
from fastmoco.bench.journal import Journal
from fastmoco.data.manifest import scan
from fastmoco.presets import PRESETS

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(PRESETS["v2"][1], crop_size=32)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decode.various(tmp_path_factory.mktemp("images"), 17)


def outcome_of(images: Path) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    journal = Journal()
    rows = decode.run(RECIPE, CPU, data=images, journal=journal)
    return {(row.name, row.provider): row.median for row in rows}, journal.failures


def test_the_files_are_of_several_kinds_and_sizes(images: Path) -> None:
    files = [Image.open(path) for path in sorted(images.iterdir())]
    assert len({image.size for image in files}) == 17 and {image.mode for image in files} == {"RGB", "L"}
    assert any(image.info.get("progressive") for image in files) and not scan(images, cache=False).rejected


def test_a_cpu_decodes_what_it_decodes(images: Path) -> None:
    rows, failures = outcome_of(images)
    assert failures == {} and rows.pop((SAME, CONTROL)) == 17
    assert len(rows) == 2 * len(decode.SHARES) and set(rows.values()) == {0.0}


@pytest.mark.parametrize("harm", ["skipped", "another's", "black", "unsteady"])
def test_one_wrong_image_is_a_failure(images: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    """What an engine does that reports success: old memory, another image's pixels, none, or others each time."""
    plain, calls = decode.rows_of_images, []

    def decoded(manifest: object, recipe: object, device: torch.device, share: float) -> torch.Tensor:
        calls.append(share)
        result = plain(manifest, recipe, device, share)
        if share == 1.0 and harm == "unsteady":
            result[5, 0, 0, 0] += len(calls) % 2  # one level of one pixel
        elif share == 1.0:
            result[5] = {"skipped": 77, "another's": result[6], "black": 0}[harm]
        return result

    monkeypatch.setattr(decode, "rows_of_images", decoded)
    rows, failures = outcome_of(images)
    ((what, why),) = failures.items()
    assert what == "decoding with engine's share 1" and "1 of 17 images differ" in why
    assert rows[AGAIN if harm == "unsteady" else SAME, "engine's share 1"] == 1
    assert rows[SAME, "engine's share 0"] == rows[AGAIN, "engine's share 0"] == 0


def test_a_comparison_that_is_blind_proves_nothing(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "FAR", 300.0)
    rows, failures = outcome_of(images)
    assert rows[SAME, CONTROL] == 0 and "the comparison is blind" in failures[CONTROL]
