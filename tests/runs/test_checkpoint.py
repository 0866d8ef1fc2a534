"""Checkpoints: what is saved comes back, every damage is noticed, the one before is used."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastmoco import atomic
from fastmoco.runs import checkpoint
from fastmoco.runs.checkpoint import CheckpointError

META = {"recipe": {"arch": "resnet18", "crop_scale": (0.2, 1.0)}}


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {
        "encoder_q.conv1.weight": weight,
        "encoder_k.conv1.weight": weight,  # shares its memory, as masters may do
        "encoder_q.bn1.num_batches_tracked": torch.tensor(step),
        "velocity.conv1.weight": torch.randn(8, 3, 3, 3, generator=generator),
        "queue": torch.randn(64, 16, generator=generator).bfloat16(),
        "queue_pointer": torch.tensor([step % 64]),
        "queue_count": torch.tensor(step),
    }


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def test_what_is_saved_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, 7, state(7), META)
    assert path.name == "step_00000007" and checkpoint.latest(tmp_path) == path
    content = checkpoint.load(path)
    assert content.step == 7 and content.meta["recipe"] == META["recipe"]
    assert_same(content.state, state(7))
    assert (tmp_path / "checkpoints/latest/model.safetensors").stat().st_size > 0
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["versions"]["torch"] == metadata.version("torch")


def test_a_run_that_was_copied_saves_on(tmp_path):
    """Many ways of copying make a folder of the link; it is set aside, and so is the next one."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", step, state(step), META)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "copy").rename(tmp_path / "run")
        assert not (tmp_path / "run/checkpoints/latest").is_symlink()
    checkpoint.save(tmp_path / "run", 3, state(3), META)
    root = tmp_path / "run/checkpoints"
    assert os.readlink(root / "latest") == "step_00000003"
    assert sorted(path.name for path in root.glob("latest*")) == ["latest", "latest.copy", "latest.copy1"]
    assert checkpoint.load(checkpoint.latest(tmp_path / "run")).step == 3


@pytest.mark.parametrize(("answer", "saved"), [(errno.EPERM, True), (errno.EOPNOTSUPP, True), (errno.ENOSPC, False)])
def test_a_file_system_without_links(answer, saved, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(Path, "symlink_to", refused)
    with nullcontext() if saved else pytest.raises(OSError, match="No space"):
        assert checkpoint.save(tmp_path, 5, state(5), META) == checkpoint.latest(tmp_path)
    assert not (tmp_path / "checkpoints/latest").exists()


def test_the_newest_are_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 30, 4):
        checkpoint.save(tmp_path, step, state(step), META, keep=1)  # never fewer than two
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000030"]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
def test_every_flipped_byte_is_noticed(tmp_path, name):
    path = checkpoint.save(tmp_path, 3, state(3), META)
    size = (path / name).stat().st_size
    for at in torch.randint(size, (40,), generator=torch.Generator().manual_seed(0)).tolist():
        flip(path / name, at)
        assert checkpoint.damage(path), f"byte {at} of {name}"
        flip(path / name, at)
    assert checkpoint.damage(path) is None


def test_torch_alone_notices_no_flip_in_the_tensors(tmp_path):
    """The control: without the hashes a flipped weight would be trained on."""
    path = checkpoint.save(tmp_path, 3, state(3), META)
    flip(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 5)
    assert checkpoint.load(path, verified=True).state.keys() == state(3).keys()
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "emptied", "removed"])
def test_the_one_before_is_used_and_the_damaged_one_set_aside(tmp_path, name, how):
    good = checkpoint.save(tmp_path, 3, state(3), META)
    bad = checkpoint.save(tmp_path, 4, state(4), META)
    file = bad / name
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if how == "emptied" else -1])
    messages = []
    assert checkpoint.latest(tmp_path, messages.append) == good
    assert len(messages) == 1 and name in messages[0] and "step_00000004.damaged" in messages[0]
    assert not bad.exists() and bad.with_name("step_00000004.damaged").exists()
    assert checkpoint.save(tmp_path, 4, state(4), META) == checkpoint.latest(tmp_path)


def test_no_good_checkpoint_is_an_error_with_every_reason(tmp_path):
    for step in (3, 4):
        flip(checkpoint.save(tmp_path, step, state(step), META) / "state.pt", 100)
    with pytest.raises(CheckpointError, match=r"step_00000004 \(state.pt.*step_00000003 \(state.pt") as error:
        checkpoint.latest(tmp_path)
    assert error.value.exit_code == 3
    with pytest.raises(CheckpointError, match="damaged"):  # and it stays one: a run must not start over silently
        checkpoint.latest(tmp_path)


def test_an_earlier_checkpoint_survives_a_failing_disk(tmp_path, monkeypatch):
    good = checkpoint.save(tmp_path, 3, state(3), META)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                checkpoint.save(tmp_path, 4, state(4), META)
        assert checkpoint.latest(tmp_path) == good
        assert not list((tmp_path / "checkpoints").glob("*.writing"))


def test_a_good_checkpoint_of_the_same_step_stays(tmp_path):
    path = checkpoint.save(tmp_path, 3, state(3), META)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert checkpoint.save(tmp_path, 3, state(3), META) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before
    flip(path / "state.pt", 100)
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 3, state(3), META)).state, state(3))


def test_no_pickled_code_is_run(tmp_path):
    path = checkpoint.save(tmp_path, 3, state(3), META)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"tensors": {}, "meta": Evil()}, path / "state.pt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        checkpoint.load(path, verified=True)
    assert not (tmp_path / "owned").exists()


def flips_and_cuts(path, flips: int, cuts: int):
    """(name, damaged bytes): `flips` single bits and `cuts` truncations, spread over the files of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    files = sorted(path.iterdir())
    for number in range(flips + cuts):
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        at = int(torch.randint(len(data), (), generator=generator))
        if number < flips:
            data[at] ^= 1 << int(torch.randint(8, (), generator=generator))
        yield file, bytes(data if number < flips else data[:at])


def test_250_of_250_damages_are_noticed_and_the_one_before_is_used(tmp_path):
    """The control: of the flips in the tensors, torch.load and safetensors notice none."""
    good = checkpoint.save(tmp_path, 3, state(3), META)
    bad = checkpoint.save(tmp_path, 4, state(4), META)
    hits = 0
    for file, data in flips_and_cuts(bad, 200, 50):
        whole = file.read_bytes()
        file.write_bytes(data)
        messages = []
        hits += checkpoint.latest(tmp_path, messages.append) == good and file.name in messages[0]
        aside = bad.with_name(bad.name + ".damaged")
        aside.rename(bad)
        file.write_bytes(whole)
    print(f"{hits} of 250 noticed")
    assert hits == 250 and checkpoint.latest(tmp_path) == bad


def test_torch_and_safetensors_notice_no_flip_in_the_tensors(tmp_path):
    """Flips of tensor data, 100 a file: the numbers that training would go on with. The zip's own names are no data."""
    from safetensors.torch import load_file

    path = checkpoint.save(tmp_path, 3, {**state(3), "velocity.big": torch.zeros(100_000)}, META)
    readers = {"model.safetensors": load_file, "state.pt": lambda file: torch.load(file, weights_only=True)}
    silent = 0
    for name, read in readers.items():
        size = (path / name).stat().st_size
        for number in range(100):
            at = size // 2 + number * (size // 250)  # far from the header before and the zip's directory behind
            flip(path / name, at)
            read(path / name)
            silent += checkpoint.damage(path) is not None
            flip(path / name, at)
    print(f"torch.load and safetensors: {200 - silent} of 200 noticed")
    assert silent == 200


def test_what_no_permission_lets_us_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 3, state(3), META)
    for number, expected in ((5, "cannot be read: Input/output error"), (13, None)):
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "sha256", failing(OSError(number, os.strerror(number), "model.safetensors")))
            if expected:
                assert expected in checkpoint.damage(path)
            else:
                with pytest.raises(PermissionError):
                    checkpoint.damage(path)


def failing(error: Exception):
    def fail(*_):
        raise error

    return fail


def save_forever(run, whole: bool) -> None:
    torch.set_num_threads(1)
    big = {"encoder_q.w": torch.randn(1_000_000), "velocity.w": torch.randn(500_000)}
    for step in range(1, 10_000):
        if whole:
            checkpoint.save(run, step, big, {})
        else:
            torch.save(big, run / "checkpoint.pt")


def killed_while_saving(run, whole: bool, seconds: float) -> None:
    run.mkdir()
    writer = multiprocessing.get_context("fork").Process(target=save_forever, args=(run, whole))
    writer.start()
    while not (checkpoint.steps(run) or (run / "checkpoint.pt").exists()):
        time.sleep(0.002)
    time.sleep(seconds)
    writer.kill()
    writer.join()


@pytest.mark.slow
def test_40_kills_during_saves_corrupt_nothing(tmp_path):
    """At random moments of a process that does nothing but save."""
    drafts = 0
    for trial in range(40):
        run = tmp_path / str(trial)
        killed_while_saving(run, True, 0.05 + 0.25 * float(torch.rand((), generator=seeded(trial))))
        drafts += any((run / "checkpoints").glob("*.writing"))
        newest = checkpoint.latest(run, failing(AssertionError("no checkpoint may be damaged")))
        assert checkpoint.damage(newest) is None
        assert checkpoint.load(newest, verified=True).state["encoder_q.w"].shape == (1_000_000,)
        assert not list(newest.parent.glob("*.damaged")) and not list(newest.parent.glob("*.writing"))
        shutil.rmtree(run)
    print(f"{drafts} of 40 kills hit a save in the middle, 0 corrupt")
    assert drafts >= 10, "the kills must have hit saves"


@pytest.mark.slow
def test_kills_during_a_plain_torch_save_do_corrupt(tmp_path):
    """The control."""
    corrupt = 0
    for trial in range(20):
        run = tmp_path / str(trial)
        killed_while_saving(run, False, 0.05 + 0.25 * float(torch.rand((), generator=seeded(trial))))
        try:
            torch.load(run / "checkpoint.pt", weights_only=True)
        except (RuntimeError, EOFError):
            corrupt += 1
        shutil.rmtree(run)
    print(f"plain torch.save: {corrupt} of 20 corrupt")
    assert corrupt >= 1


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
