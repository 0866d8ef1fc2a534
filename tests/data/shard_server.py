"""An HTTP server on this machine that serves a folder by ranges, counts what is asked for, and fails when told to."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[int], str]
"""Given the number of a request: how it fails (503, cut, lost, slow), or ""."""


class ShardServer:
    """Serves `folder` while the context lasts; `close` and `open` take it away and bring it back under its address."""

    def __init__(self, folder: Path, fault: Fault = lambda _: "", bytes_per_second: float = 0) -> None:
        self.folder, self.fault, self.rate = folder, fault, bytes_per_second
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.number, self.port, self.absence, self._lock = 0, 0, False, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self.absence = False
        self.server = Server(("127.0.0.1", self.port), type("Handler", (Handler,), {"shards": self}))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.absence = True  # for connections that are there
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> ShardServer:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_fault(self, path: str) -> str:
        with self._lock:
            self.number += 1
            self.asked[path] += 1
            return "lost" if self.absence else self.fault(self.number)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""


class Handler(BaseHTTPRequestHandler):
    shards: ShardServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.shards.folder / self.path.lstrip("/")
        fault = self.shards.next_fault(self.path.lstrip("/")) if path.exists() else ""
        if fault == "lost":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "503" or not path.exists():
            self._head(503 if path.exists() else 404, 0)
        elif path.is_dir():
            links = "".join(f'<a href="{each.name}">{each.name}</a>\n' for each in sorted(path.iterdir()))
            self._head(200, len(links))
            self.wfile.write(links.encode() if body else b"")
        else:
            if fault == "slow":
                time.sleep(0.3)
            self._file(path, body, cut=fault == "cut")

    def _file(self, path: Path, body: bool, cut: bool) -> None:
        size, asked = path.stat().st_size, self.headers.get("Range")
        first, last = 0, size
        if asked:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end) + 1 if end else size, size)
        more = {"Content-Range": f"bytes {first}-{last - 1}/{size}"} if asked else {}
        self._head(206 if asked else 200, last - first, ETag=f'"{path.stat().st_mtime_ns}"', **more)
        if not body:
            return
        with path.open("rb") as file:
            file.seek(first)
            data = file.read((last - first) // 2 if cut else last - first)
        if self.shards.rate:
            time.sleep(len(data) / self.shards.rate)
        self.wfile.write(data)
        self.shards.sent[self.path.lstrip("/")] += len(data)
        if cut:
            self.close_connection = True

    def _head(self, status: int, length: int, **more: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in {"Accept-Ranges": "bytes", **more}.items():
            self.send_header(name, value)
        self.end_headers()
