"""`python -m fastmoco.bench.throttled FOLDER`: images a second from a slow server, by order of the epoch.

A server on this machine makes every request wait --latency-ms and hands out --mb-per-s over all connections, as an
object store far away does. Read are the images of one epoch, by as many threads as a loader for a GPU has at least, in
a global order (image by image) and by windows (whole shards, fetched ahead). Nothing is decoded. FOLDER is emptied at
the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.data.loader import GPU_READERS, announced
from fastmoco.data.manifest import Manifest, scan
from fastmoco.data.plan import Plan
from fastmoco.data.remote import RemoteShards
from fastmoco.data.shard_source import Fetching
from fastmoco.presets import PRESETS

BATCH = 64


class Handler(BaseHTTPRequestHandler):
    """Serves ranges of files, slowly."""

    protocol_version = "HTTP/1.1"
    folder, latency, rate = Path(), 0.0, 0.0
    wire = threading.Lock()
    asked: Counter[str] = Counter()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """Size of a file."""
        self._answer(False)

    def do_GET(self) -> None:
        """A file, a range of one, or a list of links."""
        self._answer(True)

    def _answer(self, body: bool) -> None:
        path = self.folder / self.path.lstrip("/")
        self.asked[path.suffix] += body
        time.sleep(self.latency)
        if path.is_dir():
            data = "".join(f'<a href="{each.name}">{each.name}</a>' for each in path.iterdir()).encode()
        else:
            data = path.read_bytes() if path.is_file() else b""
        whole = len(data)
        wanted_range = self.headers.get("Range", "")
        if wanted_range:
            first, last = wanted_range.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        self.send_response((206 if wanted_range else 200) if path.exists() else 404)
        if wanted_range:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            with self.wire:
                time.sleep(len(data) / self.rate)
            self.wfile.write(data)


def shards(folder: Path, count: int, each: int) -> None:
    """`count` archives of `each` JPEGs of 20 to 30 kB."""
    generator = np.random.default_rng(0)
    for number in range(count):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as archive:
            for i in range(each):
                jpeg = BytesIO()
                noise = generator.integers(0, 256, (16, 16, 3), np.uint8)
                image = Image.fromarray(noise).resize((320, 240)).effect_spread(3)
                image.save(jpeg, "JPEG", quality=90)
                info = tarfile.TarInfo(f"{number:06d}/{i:06d}.jpg")
                info.size = len(jpeg.getvalue())
                jpeg.seek(0)
                archive.addfile(info, jpeg)


def epoch(images: Manifest, order: str, window: int) -> dict[str, Any]:
    """Images a second of one epoch, and requests for shards."""
    recipe = dataclasses.replace(
        PRESETS["v2"][1], batch_size=BATCH, bn_group=BATCH, order=order, window_shards=window, seed=1
    )
    plan = Plan(recipe, images.sizes, shards=images.shards)
    assert isinstance(images.source, RemoteShards)
    images.source.whole = order == "windows"
    Handler.asked.clear()
    began, first = time.perf_counter(), 0.0
    with ThreadPoolExecutor(GPU_READERS[0]) as pool:
        for step in announced(images, plan, range(plan.steps_per_epoch)):
            list(pool.map(images.read, plan.samples(step).tolist()))
            first = first or time.perf_counter() - began
    seconds = time.perf_counter() - began
    count = plan.steps_per_epoch * BATCH
    return {"images_per_s": count / seconds, "first_batch_s": first, "requests": Handler.asked[".tar"], "images": count}


def main() -> None:
    """Measure, print and clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--each", type=int, default=200, help="images in a shard")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--mb-per-s", type=float, default=50)
    options = parser.parse_args()
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists: name a folder that may be removed")
    (options.folder / "set").mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(options.folder / "cache")
    try:
        shards(options.folder / "set", options.shards, options.each)
        Handler.folder, Handler.rate = options.folder / "set", 1e12
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        scan(url, fetching=Fetching(0))  # the table is there; what follows is reading
        Handler.latency, Handler.rate = options.latency_ms / 1e3, options.mb_per_s * 1e6
        for order in ("table", "windows"):
            fetching = Fetching(1 if order == "windows" else 0, options.folder / "kept")
            images = scan(url, fetching=fetching)
            print(json.dumps({"order": order, **epoch(images, order, options.window)}), flush=True)
        server.shutdown()
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
