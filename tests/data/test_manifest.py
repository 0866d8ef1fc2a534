"""Which files count as images, the reason for every other, and what the cache may and may not do."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from data.made_images import encode, write

from fastmoco.data import manifest as manifest_module
from fastmoco.data.manifest import DataError, Manifest, probe, scan, split


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


JPEG = encode()


def test_class_folders_nested_with_spaces_and_unicode(tmp_path: Path) -> None:
    for name in ("great dane/a b.jpg", "great dane/deep/er/c.jpg", "œuf 卵/d.jpg", "zebra/#e%20.jpg"):
        write(tmp_path / name, JPEG)
    write(tmp_path / "README.txt", b"hello")
    write(tmp_path / ".hidden/x.jpg", JPEG)
    write(tmp_path / "zebra/.DS_Store", b"\0\0")
    images = scan(tmp_path)
    assert images.paths == ["great dane/a b.jpg", "great dane/deep/er/c.jpg", "zebra/#e%20.jpg", "œuf 卵/d.jpg"]
    assert images.classes == ["great dane", "zebra", "œuf 卵"] and images.labels.tolist() == [0, 0, 1, 2]
    assert images.rejected == [("README.txt", "not an image")]
    assert (
        images.sizes.tolist() == [[48, 64]] * 4 and images.sizes.dtype == np.int32 and images.labels.dtype == np.int64
    )
    assert bytes(images.read(0)) == JPEG and images.path(0) == str(tmp_path / "great dane/a b.jpg")


def test_flat_and_mixed_folders_and_a_single_class_have_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "one/only/a.jpg", JPEG)
    assert scan(tmp_path).labels is None and scan(tmp_path / "one/only").labels is None
    write(tmp_path / "two/b.jpg", JPEG)
    assert scan(tmp_path).classes == ["one", "two"]
    for name in ("c.jpg", "d.jpg", "e.jpg"):
        write(tmp_path / name, JPEG)
    mixed = scan(tmp_path)
    assert len(mixed) == 5 and mixed.labels is None and mixed.classes == []


def test_a_stray_picture_beside_class_folders_is_named_and_passed_over(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/c.jpg", "montage.jpg"):
        write(tmp_path / name, JPEG)
    images = scan(tmp_path)
    assert images.classes == ["cat", "dog"] and len(images) == 3
    assert images.rejected == [("montage.jpg", "in no class, where the others are")]
    listing = tmp_path / "list.txt"  # who lists it wants it
    listing.write_text("cat/a.jpg\tcat\ndog/c.jpg\tdog\nmontage.jpg\n")
    assert len(scan(listing)) == 3 and scan(listing).labels is None


@pytest.mark.parametrize("litter", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"])
def test_folders_that_systems_leave_are_no_classes(tmp_path: Path, litter: str) -> None:
    for name in ("cat/a.jpg", "dog/b.jpg", f"{litter}/thumb.jpg", f"cat/{litter}/thumb.jpg"):
        write(tmp_path / name, JPEG)
    images = scan(tmp_path)
    assert images.classes == ["cat", "dog"] and images.paths == ["cat/a.jpg", "dog/b.jpg"]
    assert sorted(path for path, _ in images.rejected) == [litter, f"cat/{litter}"] or len(images.rejected) == 2


def test_what_is_no_file_in_a_list_is_named_and_never_opened(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", JPEG)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.txt").write_text("a.jpg\npipe.jpg\nfolder\n/dev/zero\ngone.jpg\n")
    images = scan(tmp_path / "list.txt")
    assert images.paths == ["a.jpg"]
    reasons = dict(images.rejected)
    assert {reasons[name] for name in ("pipe.jpg", "folder", "/dev/zero")} == {"not a regular file"}
    assert "No such file" in reasons["gone.jpg"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.jpg\tcat\na.jpg\tdog\n", "line 2, a.jpg: another class than before \\(cat\\)"),
        ("a.jpg\tcat\nb.jpg\t\n", "line 2, b.jpg: no class after its tab"),
        ("a.jpg 0\nb.jpg 1\n", "behind a tab, not behind ' '"),
        ("a.jpg,0\nb.jpg,1\n", "behind a tab, not behind ','"),
    ],
)
def test_lists_with_classes_that_do_not_fit(tmp_path: Path, lines: str, message: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / name, JPEG)
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        scan(tmp_path / "list.txt")


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("0", "2", "10"):
        write(tmp_path / name / "a.jpg", JPEG)
    assert scan(tmp_path).classes == ["0", "2", "10"]


def test_list_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "b c/é #.jpg", JPEG)
    write(tmp_path / "a.jpg", JPEG)
    lines = f"\ufeffb c/é #.jpg\r\n\n{tmp_path / 'a.jpg'}\nmissing.jpg\n"
    listing = write(tmp_path / "list.txt", lines.encode())
    images = scan(listing)
    assert images.paths == [str(tmp_path / "a.jpg"), "b c/é #.jpg"] and images.labels is None
    assert images.rejected == [("missing.jpg", "unreadable: No such file or directory")]
    assert all(len(images.read(i)) for i in range(2))
    listing.write_text("a.jpg\tdog\nb c/é #.jpg\tcat\n")
    images = scan(listing)
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [1, 0]
    listing.write_text("a.jpg\tdog\nb c/é #.jpg\n")
    assert scan(listing).labels is None


def test_validation_part_takes_the_numbering_of_the_training_part(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/a/1.jpg"):
        write(tmp_path / name, JPEG)
    train_path, val_path = split(tmp_path)
    train = scan(train_path)
    assert scan(val_path, classes=train.classes).labels.tolist() == [0, 2]
    write(tmp_path / "val/d/1.jpg", JPEG)
    with pytest.raises(DataError, match="class 'd' is not among the 3 classes"):
        scan(val_path, classes=train.classes)


def test_split(tmp_path: Path) -> None:
    assert split(tmp_path) == (str(tmp_path), None)
    (tmp_path / "train").mkdir()
    assert split(tmp_path) == (str(tmp_path / "train"), None)
    (tmp_path / "test").mkdir()
    assert split(tmp_path) == (str(tmp_path / "train"), str(tmp_path / "test"))
    (tmp_path / "val").mkdir()
    assert split(tmp_path) == (str(tmp_path / "train"), str(tmp_path / "val"))


def test_links_that_loop_or_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "data/a/1.jpg", JPEG)
    write(tmp_path / "data/b/2.jpg", JPEG)
    (tmp_path / "data/b/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/sideways").symlink_to(tmp_path / "data/b")
    (tmp_path / "data/itself").symlink_to(tmp_path / "data/itself")
    (tmp_path / "data/gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "data/good.jpg").symlink_to(tmp_path / "data/a/1.jpg")
    os.mkfifo(tmp_path / "data/pipe.jpg")
    images = scan(tmp_path / "data")
    assert images.paths == ["a/1.jpg", "a/sideways/2.jpg", "good.jpg"]  # each folder once, by the first way in
    assert dict(images.rejected) == {
        "a/sideways/up": "folder already entered by another path",
        "b": "folder already entered by another path",
        "gone.jpg": "broken link",
        "itself": "broken link",
        "pipe.jpg": "not a regular file",
    }


@pytest.mark.parametrize("make", ["missing", "empty", "only text", "an image", "an archive"])
def test_nothing_usable_is_one_clear_line(tmp_path: Path, make: str) -> None:
    path = tmp_path / "data"
    if make in ("empty", "only text"):
        path.mkdir()
    if make == "only text":
        (path / "a.txt").write_text("hello")
    if make in ("an image", "an archive"):
        path.write_bytes(JPEG if make == "an image" else bytes(512))
    with pytest.raises(DataError) as error:
        scan(path)
    message = str(error.value)
    assert error.value.exit_code == 2 and str(path) in message and "\n" not in message
    assert ("a.txt: not an image" in message) == (make == "only text")


def test_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data/a.jpg", JPEG)
    write(tmp_path / "data/closed/b.jpg", JPEG)
    closed, scandir = [str(tmp_path / "data/closed")], os.scandir  # root may read anything, so refuse here

    def refuse(path: str) -> object:
        if path.rstrip("/") in closed:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert scan(tmp_path / "data").rejected == [("closed", "unreadable folder: Permission denied")]
    closed.append(str(tmp_path / "data"))
    with pytest.raises(DataError, match="cannot read the folder: Permission denied"):
        scan(tmp_path / "data")


class Probes:
    """Counts the headers that a scan reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        monkeypatch.setattr(manifest_module, "probe", self)

    def __call__(self, path: str, start: int, size: int | None, max_pixels: int) -> tuple[int, int, str]:
        self.paths.append(Path(path).name)
        return probe(path, start, size, max_pixels)


def same(a: Manifest, b: Manifest) -> bool:
    return a.paths == b.paths and np.array_equal(a.sizes, b.sizes) and a.rejected == b.rejected


def test_cache_spares_unchanged_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "b.jpg", "bad.txt"):
        write(tmp_path / name, JPEG if name != "bad.txt" else b"text")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    probes = Probes(monkeypatch)
    first = scan(tmp_path)
    assert sorted(probes.paths) == ["a.jpg", "b.jpg", "bad.txt"]
    assert same(scan(tmp_path), first) and len(probes.paths) == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before  # nothing written beside the data

    os.utime(write(tmp_path / "b.jpg", encode(size=(56, 40))), ns=(0, before[tmp_path / "b.jpg"]))
    write(tmp_path / "c.jpg", JPEG)
    (tmp_path / "a.jpg").unlink()
    probes.paths.clear()
    second = scan(tmp_path)  # b by its size, c because it is new
    assert sorted(probes.paths) == ["b.jpg", "c.jpg"] and second.sizes.tolist() == [[40, 56], [48, 64]]
    os.utime(tmp_path / "c.jpg", ns=(0, 12345))
    probes.paths.clear()
    assert same(scan(tmp_path), second) and probes.paths == ["c.jpg"]
    probes.paths.clear()
    scan(tmp_path, max_pixels=10**7)
    assert len(probes.paths) == 3  # another limit is another question
    probes.paths.clear()
    scan(tmp_path, cache=False)
    assert len(probes.paths) == 3


def test_damaged_or_unwritable_cache_is_ignored(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jpg", JPEG)
    write(tmp_path / "b.jpg", JPEG)
    first = scan(tmp_path)
    (cached,) = (cache_home / "fastmoco").iterdir()
    whole = cached.read_bytes()
    generator = random.Random(0)
    for trial in range(60):
        damaged = bytearray(whole[: generator.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(3 if damaged else 0):
            damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
        cached.write_bytes(bytes(damaged))
        assert same(scan(tmp_path), first), trial
    blocked = write(tmp_path.parent / "blocked", b"a file where a folder is wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert same(scan(tmp_path), first)
    assert not list((cache_home / "fastmoco").glob("*.partial"))


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    for i in range(600):
        write(tmp_path / f"{i}.jpg", JPEG)
    messages: list[tuple[str, int, int]] = []
    scan(tmp_path, progress=lambda *now: messages.append(now))
    assert messages == [("headers", count, 600) for count in (256, 512, 600)]


@pytest.mark.parametrize("state", ["new", "cached"])
def test_benchmark_scan_of_5000_files(tmp_path: Path, benchmark: object, state: str) -> None:
    """The aim is 5,000 files a second on two cores: one second or less."""
    data = encode(size=(500, 375), quality=60)
    for i in range(5000):
        write(tmp_path / f"{i % 20}/{i}.jpg", data)
    scan(tmp_path)
    assert len(benchmark(lambda: scan(tmp_path, cache=state == "cached"))) == 5000
