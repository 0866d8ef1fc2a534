"""What is written replaces the old file at once: a reader, a kill or a full disk never sees half of it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fastmoco import atomic

SIZE = 200_000


def kill_while(write, path: Path, seconds: float) -> None:
    """Let a fork call `write(path)` over and over, and kill it after `seconds`."""
    child = os.fork()
    if not child:
        while True:
            write(path)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def whole(path: Path) -> bool:
    try:
        return len(json.loads(path.read_text())) == SIZE
    except ValueError:
        return False


@pytest.mark.parametrize("number", range(3))
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, number: int) -> None:
    path = tmp_path / "facts.json"
    atomic.write_json(path, [0] * SIZE)
    kill_while(lambda path: atomic.write_json(path, [1] * SIZE), path, 0.1 + 0.05 * number)
    assert whole(path)


def test_control_a_plain_write_is_caught_half_way(tmp_path: Path) -> None:
    path, text = tmp_path / "facts.json", json.dumps([0] * SIZE)

    def in_place(path: Path) -> None:
        with path.open("w", buffering=4096) as file:
            for at in range(0, len(text), 1000):
                file.write(text[at : at + 1000])

    torn = 0
    for number in range(20):
        kill_while(in_place, path, 0.02 + 0.003 * number)
        torn += not whole(path)
    assert torn > 0


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "facts.txt"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["facts.txt"]


def test_a_folder_appears_with_all_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "encoder.d"
    with atomic.replacing(path) as draft:
        (draft / "inner").mkdir(parents=True)
        (draft / "inner" / "weights").write_bytes(b"123")
        assert draft.suffix == ".d" and not path.exists()
    assert (path / "inner" / "weights").read_bytes() == b"123" and os.listdir(tmp_path) == ["encoder.d"]


def test_everything_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = atomic.sync, os.replace
    monkeypatch.setattr(atomic, "sync", lambda path: calls.append(f"sync {path.name}") or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    atomic.write_text(tmp_path / "facts.txt", "new")
    assert calls == [f"sync {atomic.MARK}{os.getpid()}-facts.txt", "rename", f"sync {tmp_path.name}"]
