"""Every image of a set decoded once, in a child process: a decoder that crashes costs one line with the file's name.

The child decodes whole batches. Where it dies, or does not go on, another one takes the images that were under way one
at a time, and the one that it dies of is named.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastmoco.data.manifest import CheckResult, Manifest
from fastmoco.data.rewrite import Reading

UNDER_WAY = 64  # images that a child may have begun and not yet reported, at most
CHILD = [sys.executable, "-m", "fastmoco.data.full_scan"]
PATIENCE = 120.0  # seconds without a word after which a decoder counts as stuck


class _Share(NamedTuple):
    """What one child does."""

    first: int
    last: int
    alone: bool
    """Whether each image is decoded alone."""


def decode_apart(images: Manifest, threads: int | None = None, reading: Reading = Reading()) -> Iterator[CheckResult]:
    """For each image in order, what decoding it on the CPU as `reading` says came to."""
    with tempfile.TemporaryDirectory() as folder:
        manifest_file = Path(folder, "images.npz")
        images.save(manifest_file)
        settings: dict[str, Any] = {
            "images": str(manifest_file),
            "root": images.root,
            "threads": threads,
            "reading": reading,
        }
        count, total, alone = 0, len(images), False
        while count < total:
            share = _Share(count, min(count + UNDER_WAY, total) if alone else total, alone)
            count, fate = yield from _by_child({**settings, "share": share}, Path(folder, "stderr"))
            alone = bool(fate)
            if fate and share.alone:
                yield CheckResult(fate, 0)
                count += 1


def _by_child(settings: dict[str, Any], stderr: Path) -> Generator[CheckResult, None, tuple[int, str]]:
    """What a child says of its share; returns the first image that it did not come to, and how it died, or ""."""
    count, last = settings["share"][:2]
    command = [*CHILD, json.dumps(settings)]
    with (
        stderr.open("w+b") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as child,
    ):
        assert child.stdout is not None
        try:
            for line in _lines(child.stdout):
                yield CheckResult(*json.loads(line))
                count += 1
            stuck = child.poll() is None and count < last and not _has_ended(child)
            if stuck:
                child.kill()
            code = child.wait()
        finally:
            child.kill()
        if stuck:
            return count, f"the decoder does not end within {PATIENCE:.0f} s"
        if code < 0:
            return count, f"the decoder crashed ({signal.Signals(-code).name})"
        if code:
            errors.seek(0)
            raise RuntimeError(f"decoding apart failed:\n{errors.read().decode(errors='replace')}")
    return count, ""


def _has_ended(child: subprocess.Popen) -> bool:
    try:
        child.wait(1)
    except subprocess.TimeoutExpired:
        return False
    return True


def _lines(stdout: IO[bytes]) -> Iterator[bytes]:
    """Whole lines, until the other end closes or is silent for too long."""
    rest = b""
    while select.select([stdout], [], [], PATIENCE)[0] and (data := os.read(stdout.fileno(), 1 << 16)):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def main(settings: dict) -> None:
    """The child: say what becomes of each image, a line of JSON each."""
    from fastmoco.data.pipeline import undecodable

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to report
    share = _Share(*settings["share"])
    images = Manifest.load(settings["images"], settings["root"]).take(range(share.first, share.last))
    background, value_range = settings["reading"]
    reading = Reading(background, tuple(value_range) if isinstance(value_range, list) else value_range)
    for result in undecodable(images, settings["threads"], reading, 1 if share.alone else None):
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
