"""The saver: what is written is the state of its step, the disk may fail, other errors may not."""

import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from fastmoco.runs import checkpoint
from fastmoco.train.saver import SaveError, Saver

META = {"recipe": {}}


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(64, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {"encoder_q.w": weight, "velocity.w": torch.randn(64, 3, 3, 3, generator=generator), "queue": weight[0, 0]}


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path, messages):
    saver = Saver(tmp_path, 2, 0, messages.append)
    yield saver
    saver.close()


def test_what_is_written_is_the_state_at_the_call(saver, tmp_path, monkeypatch):
    """Training goes on while the writer has not even begun. The control: the live tensors have moved on by then."""
    begin, write = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: begin.wait() and write(*arguments))
    live = state(3)
    began = time.perf_counter()
    saver.start(3, live, META)
    for value in live.values():
        value.add_(1)
    assert time.perf_counter() - began < 1 and checkpoint.latest(tmp_path) is None
    begin.set()
    saver.finish()
    content = checkpoint.load(checkpoint.latest(tmp_path)).state
    assert saver.good == 3 and all(torch.equal(content[name], value) for name, value in state(3).items())
    assert not any(torch.equal(content[name], value) for name, value in live.items())


def test_the_next_save_waits_for_the_one_before_and_memory_is_reused(saver, tmp_path):
    before = None
    for step in range(1, 6):
        saver.start(step, state(step), META)
        places = {name: value.data_ptr() for name, value in saver._copies.items()}
        assert before in (None, places)
        before = places
    saver.finish()
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000004", "step_00000005"]
    for step in (4, 5):
        content = checkpoint.load(tmp_path / f"checkpoints/step_{step:08d}").state
        assert all(torch.equal(content[name], value) for name, value in state(step).items())


def test_multiples_of_keep_every_stay(tmp_path, messages):
    saver = Saver(tmp_path, 2, 3, messages.append)
    for step in range(1, 9):
        saver.start(step, state(step), META)
    saver.finish()
    saver.close()
    assert [int(path.name[5:]) for path in checkpoint.steps(tmp_path)] == [3, 6, 7, 8]


def limited(tmp_path: Path, monkeypatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(checkpoint, "_write", _under_limit(checkpoint._write, limits))


def _under_limit(write, limits):
    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


def no_rename(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)


def read_only(tmp_path: Path, monkeypatch) -> None:
    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)


def vanished(tmp_path: Path, monkeypatch) -> None:
    away = tmp_path.with_name(tmp_path.name + "-away")
    tmp_path.rename(away)
    monkeypatch.callback = lambda: away.rename(tmp_path)


@pytest.mark.parametrize("fault", [limited, no_rename, read_only, vanished])
def test_a_disk_that_refuses_costs_a_warning_and_the_next_try_succeeds(fault, tmp_path, messages):
    run = tmp_path / "run"
    run.mkdir()
    saver = Saver(run, 2, 0, messages.append)
    saver.start(1, state(1), META)
    saver.wait()
    with pytest.MonkeyPatch.context() as patch:
        fault(run, patch)
        saver.start(2, state(2), META)
        while not saver._writing.done():
            time.sleep(0.01)
        saver.check()
    getattr(patch, "callback", lambda: None)()
    [warning] = messages
    assert "step 2 could not be written" in warning and "last good checkpoint is of step 1" in warning
    newest = checkpoint.latest(run)
    assert newest.name == "step_00000001" and not list(newest.parent.glob("*.writing"))
    saver.start(3, state(3), META)
    saver.finish()
    saver.close()
    assert checkpoint.latest(run).name == "step_00000003" and saver.good == 3 and len(messages) == 1


def test_the_last_state_is_tried_again_and_then_the_run_ends_with_an_error(saver, tmp_path, messages):
    with pytest.MonkeyPatch.context() as patch:
        no_rename(tmp_path, patch)
        saver.start(7, state(7), META)
        with pytest.raises(SaveError, match="after step 7 could not be written.*No space.*no checkpoint.*--resume"):
            saver.finish()
        assert len(messages) == 2 and SaveError.exit_code == 1
    saver.finish()  # the disk has room again: the copy is still there
    assert checkpoint.latest(tmp_path).name == "step_00000007"


def test_any_other_error_of_the_thread_is_raised(saver, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *_: 1 / 0)
    saver.start(1, state(1), META)
    while not saver._writing.done():
        time.sleep(0.01)
    with pytest.raises(ZeroDivisionError):
        saver.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU")
def test_the_copy_of_a_gpu_state_waits_for_nothing(saver, tmp_path):
    live = {name: value.cuda() for name, value in state(3).items()}
    saver.start(2, live, META)  # takes the pinned memory
    saver.wait()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(int(1e9))
        saver.start(3, live, META)
        for value in live.values():
            value.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not saver._writing.done()
    saver.finish()
    content = checkpoint.load(checkpoint.latest(tmp_path)).state
    assert all(torch.equal(content[name], value) for name, value in state(3).items())


def test_a_run_that_is_gone_is_not_made_anew(saver, tmp_path, messages):
    """A folder in its place could lie on another disk, under a mount point."""
    shutil.rmtree(tmp_path)
    saver.start(1, state(1), META)
    saver.wait()
    assert not tmp_path.exists() and "No such file" in messages[0]
    tmp_path.mkdir()
