"""Shards in an object store that speaks S3 (moto's server on this machine) give what a disk gives; its failures too."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data import test_remote
from data.test_remote import RECIPE, WINDOWS, batches, everything, same

from fastmoco.cli import main
from fastmoco.data.manifest import DataError, Manifest, scan
from fastmoco.data.shard_source import Fetching
from fastmoco.recipe import Recipe

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

own_places, shards = test_remote.own_places, test_remote.shards
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
ANSWERS = {
    f"{number} {code}": f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
    for number, code in ((503, "SlowDown"), (403, "AccessDenied"))
}


class Store:
    """A bucket `bucket` with the shards in `set/`; counts requests by kind and path, fails those that `fault` names."""

    def __init__(self, shards: Path) -> None:
        self.app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.asked: Counter[str] = Counter()
        self.fault: Callable[[int], str] = lambda number: ""
        self.server = serving.make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.shards = shards

    def fill(self) -> None:
        """Put the shards there, and nothing else: what moto keeps outlives a server."""
        store = s3fs.S3FileSystem(skip_instance_cache=True)
        if store.exists("bucket"):
            store.rm("bucket", recursive=True)
        store.makedirs("bucket")
        for path in self.shards.iterdir():
            store.pipe(f"bucket/set/{path.name}", path.read_bytes())
        self.asked.clear()

    def _answer(self, environ: dict[str, Any], start: Callable) -> Any:
        self.asked[f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"] += 1
        status = self.fault(self.asked.total())
        if status:
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else ANSWERS[status]
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return self.app(environ, start)


@pytest.fixture
def store(shards: Path, own_places: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    running = Store(shards)
    settings = {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": running.url,
        "AWS_MAX_ATTEMPTS": "1",  # so that it is we who ask again
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    running.fill()
    yield running
    running.server.shutdown()
    running.server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("recipe", [RECIPE, WINDOWS], ids=["ranges", "windows"])
def test_an_object_store_and_a_disk_give_the_same_though_one_request_in_ten_fails(
    shards: Path, store: Store, recipe: Recipe
) -> None:
    whole = recipe is WINDOWS
    near = scan(shards, cache=False)
    store.fault = lambda number: "503 SlowDown" if number % (4 if whole else 10) == 3 else ""
    far = scan("s3://bucket/set", fetching=Fetching(float(whole), patience=20))
    far.source.whole = whole
    assert everything(far) == everything(near) and far.rejected[0][1] == "not an image"
    assert same(batches(far, recipe), batches(near, recipe))
    fetched = {name: count for name, count in store.asked.items() if name.endswith(".tar")}
    assert len(fetched) == 6 and (max(fetched.values()) < 5 if whole else min(fetched.values()) > 5)


def test_a_list_is_asked_for_and_no_shard_twice(store: Store, tmp_path: Path) -> None:
    far = scan("s3://bucket/set")
    assert {name for name in store.asked if name.endswith(".tar")} == {f"GET /bucket/set/{i:06d}.tar" for i in range(6)}
    assert all(count == 1 for name, count in store.asked.items() if name.endswith(".tar"))
    far.save(tmp_path / "run.npz")
    store.asked.clear()
    again = Manifest.load(tmp_path / "run.npz", "s3://bucket/set")
    assert everything(again)[:4] == everything(far)[:4] and not store.asked


@pytest.mark.parametrize(
    ("status", "said"),
    [("503 SlowDown", "repeat the command with --resume when the server is back"), ("403 AccessDenied", "Permission")],
)
def test_a_store_that_fails_or_refuses_is_told_in_one_line_without_secrets(
    store: Store, status: str, said: str, capfd: pytest.CaptureFixture
) -> None:
    far = scan("s3://bucket/set", fetching=Fetching(0, patience=0.1))
    store.fault = lambda number: status
    with pytest.raises(DataError) as caught:
        far.read(0)
    assert main(["data", "scan", "s3://bucket/set", "--retry-seconds", "0.1", "--cache-gb", "0"]) == 3
    output = capfd.readouterr()
    for text in (str(caught.value), output.err.strip()):
        assert said in text and "\n" not in text and "AKIA" not in text and SECRET not in text
    assert SECRET not in output.out


def test_what_a_scan_writes_down_holds_no_secrets(store: Store, tmp_path: Path) -> None:
    out = ["--json", str(tmp_path / "facts"), "--index", str(tmp_path / "ix")]
    assert main(["data", "scan", "s3://bucket/set", *out]) == 0
    assert json.loads((tmp_path / "facts").read_text())["training"]["images"] == 104
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"s3://bucket/set" in written and b"AKIA" not in written and SECRET.encode() not in written
