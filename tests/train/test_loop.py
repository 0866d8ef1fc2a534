"""The loop: a resumed run is the undisturbed run, bit for bit; a run asked to stop stops; what it writes is true."""

import gc
import json
import math
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.contrast.update import resolve_precision
from fastmoco.data import loader
from fastmoco.data.loader import READERS
from fastmoco.data.quarantine import NAME as QUARANTINE
from fastmoco.data.request import read
from fastmoco.options import Options, Pretrain, UsageError
from fastmoco.parallel import Parallel
from fastmoco.process.stop import StopRequest
from fastmoco.recipe import RecipeError
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.train import job, loop, record
from fastmoco.train.loop import NonFiniteError, pretrain
from fastmoco.train.monitor import Monitor
from fastmoco.train.saver import Saver
from fastmoco.train.saving import SaveClock

STEPS = 30
LINE = {
    "step",
    "epoch",
    "loss",
    "top1",
    "top5",
    "lr",
    "pairs_per_s",
    "data_wait",
    "memory",
    "queue_filled",
    "seconds",
    "nonfinite",
    "spread",
}

NEW_PROCESS = """
import dataclasses, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fastmoco.options import Options
from fastmoco.recipe import Recipe
from fastmoco.train.loop import pretrain
recipe, data = Recipe.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
for out in sys.argv[3:]:
    where = Options(data=data, out=Path(out), device="cpu", resume=True, knn=False)
    pretrain(recipe, dataclasses.replace(where, threads=2, prefetch=3))
"""


def options(images: Path, out: Path, **changes) -> Options:
    return Options(data=images, out=out, **{"device": "cpu", "threads": 1, "knn": False, "log_every": 4, **changes})


def final(out: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(checkpoint.latest(out))
    assert content.step == STEPS
    return content.state


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def whole(images, recipe, tmp_path_factory) -> Path:
    """The undisturbed run, with kNN, that every other one is compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    summary = pretrain(recipe, options(images, out, knn=True, knn_every=2), "demo")
    assert summary["steps"] == STEPS and not summary["stopped"]
    return out


def test_runs_resumed_in_a_new_process_are_bit_equal(images, recipe, whole, tmp_path):
    cuts = {11: tmp_path / "inside an epoch", 15: tmp_path / "at its end"}
    for cut, out in cuts.items():
        pretrain(recipe, options(images, out, stop_after=cut))
        assert checkpoint.latest(out).name == f"step_{cut:08d}"
    command = [sys.executable, "-c", NEW_PROCESS, json.dumps(recipe.as_dict()), images, *cuts.values()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for out in cuts.values():
        assert differing(final(out), final(whole)) == []


@pytest.mark.parametrize(("first", "then"), [("none", "amx"), ("bf16 at half rate", "none")])
def test_a_run_goes_on_in_its_precision_on_another_processor(first, then, images, recipe, tmp_path, monkeypatch):
    """Which has bf16 where the one it began on had none, or the other way round; a new run there takes the other."""
    auto, precisions = replace(recipe, precision="auto"), []
    for by, out, last, resume in ((first, "run", 2, False), (then, "run", 3, True), (then, "new", 2, False)):
        monkeypatch.setattr("fastmoco.contrast.update.instructions", lambda by=by: by)
        pretrain(auto, options(images, tmp_path / out, stop_after=last, resume=resume))
        precisions.append(checkpoint.load(checkpoint.latest(tmp_path / out)).meta["precision"])
    assert precisions == (["fp32", "fp32", "bf16"] if first == "none" else ["bf16", "bf16", "fp32"])


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "imported", None, "CPU, 64 cores"])
@pytest.mark.parametrize(("here", "auto"), [("none", "fp32"), ("amx", "bf16")])
def test_only_a_run_that_began_on_a_cpu_keeps_its_precision_there(
    device, here, auto, images, recipe, tmp_path, monkeypatch
):
    """A GPU's choice is not a CPU's, and an imported checkpoint has made none; the last row is the control."""
    where = options(images, tmp_path, resume=True)
    prepared = job.prepare(replace(recipe, precision="auto"), where, "demo", Parallel.alone("cpu"))
    other = "bf16" if auto == "fp32" else "fp32"
    (tmp_path / "recipe.json").write_text(json.dumps({"precision": other, "device": device}))
    monkeypatch.setattr("fastmoco.contrast.update.instructions", lambda: here)
    kept = record.precision_before(prepared) or resolve_precision("auto", prepared.parallel.device)
    assert kept == (other if device == "CPU, 64 cores" else auto)


@pytest.mark.parametrize("cache", [None, 0.0])
def test_a_file_that_is_damaged_meanwhile_is_met_when_it_is_read_again(cache, images, recipe, tmp_path, monkeypatch):
    """Two files are whole the first two times. Kept images are not read again, until another process goes on."""
    recipe, harmed = replace(recipe, batch_size=4, epochs=4, max_bad_share=0.1), {3, 30}
    reads: list[int] = []

    def read_while_whole(source, index, *how):
        reads.append(index)
        bad = index in harmed and reads.count(index) > 2
        return np.frombuffer(b"x", np.uint8) if bad else read(source, index, *how)

    def bad_steps(name: str) -> list[int]:
        return [line["step"] for line in read_lines(tmp_path / name / QUARANTINE)]

    monkeypatch.setattr(loader, "read", read_while_whole)
    pretrain(recipe, options(images, tmp_path / "whole", decoded_cache=cache))
    reads.clear()
    pretrain(recipe, options(images, tmp_path / "cut", decoded_cache=cache, stop_after=25))
    before = bad_steps("cut")
    reads += 2 * sorted(harmed)  # another process finds on the disk what this one has kept
    pretrain(recipe, options(images, tmp_path / "cut", decoded_cache=cache, resume=True))
    states = [checkpoint.load(checkpoint.latest(tmp_path / name)).state for name in ("whole", "cut")]
    if cache == 0:
        assert len(bad_steps("whole")) == 2 and bad_steps("cut") == bad_steps("whole")
        assert differing(*states) == []
    else:
        assert bad_steps("whole") == before == [] and len(bad_steps("cut")) == 2 and min(bad_steps("cut")) >= 25
        assert differing(*states) != []


def test_a_step_count_off_by_one_is_noticed(images, recipe, whole, tmp_path):
    """The control: the comparison above can fail."""
    out = tmp_path / "run"
    pretrain(recipe, options(images, out, stop_after=11))
    content = checkpoint.load(checkpoint.latest(out))
    checkpoint.save(out, 12, content.state, content.meta)
    pretrain(recipe, options(images, out, resume=True))
    names = differing(final(out), final(whole))
    assert {"queue", "encoder_q.conv1.weight", "encoder_k.conv1.weight", "velocity.conv1.weight"} <= set(names)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_asked_to_stop_finishes_its_step_and_can_go_on(number, images, recipe, whole, tmp_path, monkeypatch):
    out, before = tmp_path / "run", signal.getsignal(number)
    step, calls = Step.step, []

    def asking(self, batch, lr):
        calls.append(batch.step)
        if len(calls) == 7:
            signal.raise_signal(number)
        return step(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "step", asking)
        assert loop.run(Pretrain("custom", recipe, options(images, out))) == 143
    assert calls == list(range(7)) and checkpoint.latest(out).name == "step_00000007"
    assert signal.getsignal(number) is before and gc.isenabled()
    assert not (out / "summary.json").exists()
    if number == signal.SIGTERM:
        pretrain(recipe, options(images, out, resume=True))
        assert differing(final(out), final(whole)) == []
        assert [line["step"] for line in read_lines(out / "log.jsonl")] == [4, 7, 8, 12, 16, 20, 24, 28, 30]


def test_what_a_run_writes(whole, recipe):
    log, knn = read_lines(whole / "log.jsonl"), read_lines(whole / "knn.jsonl")
    assert [line["step"] for line in log] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert all(line.keys() == LINE for line in log)
    for line in log:
        assert line["epoch"] == line["step"] / 5 and line["lr"] == recipe.learning_rate(line["step"] - 1, 5)
        assert 0 < line["loss"] < 2 * math.log(21) and 0 <= line["top1"] <= line["top5"] <= 100
        assert line["pairs_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and 0 < line["memory"] < 64
        assert line["queue_filled"] == min(1, line["step"] / 3)
    assert [line["step"] for line in knn] == [0, 10, 20, 30] and knn[0]["classes"] == 2 and knn[0]["queries"] == 12
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["knn_before"] == knn[0]["top1"] and summary["knn_after"] == knn[-1]["top1"]
    assert summary["loss"] == log[-1]["loss"] and summary["chance_loss"] == math.log(21)
    facts = json.loads((whole / "recipe.json").read_text())
    settled = replace(recipe, order="table")
    assert facts["recipe"] == json.loads(json.dumps(settled.as_dict())) and facts["preset"] == "demo"
    assert {"versions", "commit", "command", "device", "options", "steps"} <= facts.keys()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(whole.glob("*.writing"))


def test_where_and_how_change_nothing(images, recipe, whole, tmp_path):
    """kNN in between, saves, threads, prefetch and logging leave the run as it is."""
    out = tmp_path / "run"
    pretrain(recipe, options(images, out, threads=3, prefetch=1, log_every=7, save_every=4, keep=3))
    assert differing(final(out), final(whole)) == []
    assert [path.name for path in checkpoint.steps(out)] == ["step_00000024", "step_00000028", "step_00000030"]


def test_a_finished_run_resumed_stays_as_it_is(images, recipe, tmp_path):
    out = tmp_path / "run"
    short = replace(recipe, epochs=1)
    pretrain(short, options(images, out))
    before = checkpoint.load(checkpoint.latest(out)).state
    assert pretrain(short, options(images, out, resume=True))["steps"] == 5
    assert differing(checkpoint.load(checkpoint.latest(out)).state, before) == []
    assert [line["step"] for line in read_lines(out / "log.jsonl")] == [4, 5]


def test_wrong_use_writes_nothing(images, recipe, whole, tmp_path):
    out = tmp_path / "run"
    for error, wrong, arguments in (
        (RecipeError, replace(recipe, batch_size=48), options(images, out)),  # more than there are images
        (UsageError, recipe, options(images, whole)),
        (UsageError, recipe, options(images, out, resume=True)),
        (UsageError, replace(recipe, temperature=0.3), options(images, whole, resume=True)),
        (UsageError, recipe, options(images, whole, resume=True, stop_after=3)),
    ):
        before = sorted(path.name for path in whole.iterdir())
        with pytest.raises(error):
            pretrain(wrong, arguments)
        assert not out.exists() and sorted(path.name for path in whole.iterdir()) == before


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(images, recipe, tmp_path, monkeypatch):
    out, step = tmp_path / "run", Step.step

    def diverging(self, batch, lr):
        return step(self, batch, math.nan if batch.step >= 6 else lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "step", diverging)
        message = "loss of rank 0 became infinite or NaN in step 8.*last good checkpoint is of step 5"
        with pytest.raises(NonFiniteError, match=message):
            pretrain(recipe, options(images, out, save_every=5))
    newest = checkpoint.latest(out)
    assert newest.name == "step_00000005"
    assert all(value.isfinite().all() for value in checkpoint.load(newest).state.values())


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(images, recipe, whole, tmp_path, monkeypatch, capsys):
    """RLIMIT_FSIZE while the checkpoint of step 8 is written; the run is not disturbed, and ends as it would have."""
    out, write, limits = tmp_path / "run", checkpoint._write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(draft: Path, step: int, *rest) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step == 8 else limits[0], limits[1]))
        try:
            write(draft, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "_write", limited)
    assert pretrain(recipe, options(images, out, save_every=4, keep=30))["steps"] == STEPS
    output = capsys.readouterr().err
    assert output.count("could not be written") == 1
    assert re.search("checkpoint of step 8 could not be written .*the last good checkpoint is of step 4", output)
    names = [path.name for path in checkpoint.steps(out)]
    assert names == [f"step_{step:08d}" for step in (4, 12, 16, 20, 24, 28, 30)]
    assert differing(final(out), final(whole)) == []
    assert [line["step"] for line in read_lines(out / "log.jsonl")] == [4, 8, 12, 16, 20, 24, 28, 30]


def test_a_run_of_which_all_checkpoints_are_damaged_ends_with_3_and_every_reason(images, flags, tmp_path, capsys):
    out = tmp_path / "run"
    where = [f"--data={images}", f"--out={out}", "--device=cpu", "--threads=1", "--no-knn"]
    assert main(["pretrain", "demo", *where, *flags, "--stop-after=2", "--save-every=1"]) == 0
    for path, name in zip(checkpoint.steps(out), ("state.pt", "model.safetensors"), strict=True):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
    capsys.readouterr()
    assert main(["pretrain", "demo", "--resume", f"--out={out}"]) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastmoco: error: ") and "step_00000001 (state.pt does not have the SHA-256" in last
    assert "step_00000002 (model.safetensors does not have the SHA-256" in last
    assert main(["pretrain", "demo", "--resume", f"--out={out}"]) == 3  # it does not start over either


def test_unlabelled_images_train_without_knn(images, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    summary = pretrain(recipe, options(images / "train" / "down", out, knn=True, stop_after=2))
    assert summary["knn_after"] is None and "no kNN evaluation" in capsys.readouterr().err


def test_an_auto_queue_is_settled_by_the_images_and_stays_so(images, recipe, tmp_path, capsys):
    auto, short = replace(recipe, queue_size="auto"), {"stop_after": 6}
    pretrain(auto, options(images, tmp_path / "auto", **short), "demo")
    assert "queue_size auto: 32 keys for 40 images, more than a quarter of them" in capsys.readouterr().err
    pretrain(replace(recipe, queue_size=32), options(images, tmp_path / "given", **short), "demo")
    assert "queue_size auto" not in capsys.readouterr().err
    runs = {name: checkpoint.load(checkpoint.latest(tmp_path / name)) for name in ("auto", "given")}
    assert differing(runs["auto"].state, runs["given"].state) == [] and len(runs["auto"].state["queue"]) == 32
    for facts in (json.loads((tmp_path / "auto/recipe.json").read_text()), runs["auto"].meta):
        assert facts["recipe"]["queue_size"] == 32
    resume = ["pretrain", "demo", "--resume", "--device", "cpu", "--threads", "1", "--stop-after", "7", "--queue-size"]
    assert main([*resume, "auto", "--out", str(tmp_path / "auto")]) == 0
    assert checkpoint.load(checkpoint.latest(tmp_path / "auto")).step == 7


def test_auto_does_not_change_a_queue_that_was_given(images, recipe, whole, capsys):
    """The control: resuming compares what auto comes to."""
    assert main(["pretrain", "demo", "--resume", "--out", str(whole), "--queue-size", "auto"]) == 2
    assert "was started with queue_size 20, not 32" in capsys.readouterr().err
    with pytest.raises(UsageError, match="was made with queue_size 20, not 32"):
        pretrain(replace(recipe, queue_size="auto"), options(images, whole, resume=True))


def test_a_save_that_is_due_is_wished_for_once():
    """On GPUs the ranks' answer comes a step later; a second wish would then be a second save, and a wait for both."""
    clock = SaveClock(minutes=10)
    assert not clock.due()
    clock.at = 0.0
    assert [clock.due() for _ in range(3)] == [True, False, False]
    never = SaveClock(minutes=0)
    never.at = 0.0
    assert not never.due()


def test_fresh_names(tmp_path):
    assert job.fresh(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert job.fresh(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.slow
def test_2000_steps_with_200_checkpoints_leave_memory_files_and_threads_as_they_were(recipe, images, tmp_path, in_fork):
    """From step 500 on: less than 8 MB more, no descriptor more, the same threads, and two checkpoints."""
    assert in_fork(soak, recipe, images, tmp_path, 2000) == 0, (tmp_path / "said").read_text()[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    print(figures)
    assert [each["step"] for each in figures] == [500, 1000, 1500, 2000] and growing(figures) == []


@pytest.mark.slow
def test_what_each_checkpoint_left_behind_would_show_within_1000_steps(recipe, images, tmp_path, in_fork):
    """The control: a megabyte, a descriptor, a thread and the checkpoint itself."""
    assert in_fork(leak, recipe, images, tmp_path, 1000) == 0, (tmp_path / "said").read_text()[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert growing(figures) == ["rss", "descriptors", "threads", "checkpoints"]


def growing(figures: list[dict[str, int]]) -> list[str]:
    first, last = figures[0], figures[-1]
    # The loader starts its readers one by one, as it needs them; a thread left at each checkpoint would make 150 more.
    threads = max(each["threads"] for each in figures) - first["threads"]
    verdicts = {
        "rss": last["rss"] - first["rss"] >= 8e6,
        "descriptors": last["descriptors"] > first["descriptors"],
        "threads": threads > READERS,
        "checkpoints": any(each["checkpoints"] > 3 for each in figures),  # two, and one on its way in or out
    }
    return [name for name, verdict in verdicts.items() if verdict]


def leak(recipe, images: Path, folder: Path, steps: int) -> None:
    copy, kept, never = Saver._copy, [], threading.Event()

    def leaking(self, state) -> None:
        block = mmap.mmap(-1, 1 << 20)  # a clone could take memory that was free when this process was forked
        block.write(b"\1" * len(block))
        kept.append((block, open(os.devnull)))
        threading.Thread(target=never.wait, daemon=True).start()
        return copy(self, state)

    Saver._copy, checkpoint._prune = leaking, lambda *_: None
    soak(recipe, images, folder, steps)


def soak(recipe, images: Path, folder: Path, steps: int) -> None:
    out, figures, advance = folder / "run", [], Monitor.advance

    def measuring(self) -> None:
        advance(self)
        measuring.step += 1
        if measuring.step % 500 == 0:
            gc.collect()
            figures.append(
                {
                    "step": measuring.step,
                    "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                    "checkpoints": len(list((out / "checkpoints").glob("step_*"))),
                }
            )

    measuring.step, Monitor.advance = 0, measuring
    small = replace(recipe, width=0.0625, epochs=steps // 5)
    assert pretrain(small, options(images, out, save_every=10, log_every=50))["steps"] == steps
    (folder / "figures.json").write_text(json.dumps(figures))


def test_a_worker_that_torchrun_started_again_goes_on(images, flags, whole, tmp_path, monkeypatch):
    """--max-restarts: without the count the folder of another run is refused, as ever."""
    out = tmp_path / "run"
    places = [f"--data={images}", f"--out={out}"]
    command = ["pretrain", "demo", *places, "--device=cpu", "--threads=1", "--no-knn", *flags]
    assert main([*command, "--stop-after=11", "--log-every=4"]) == 0
    assert main(command) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*command, "--log-every=4"]) == 0
    assert differing(final(out), final(whole)) == []
    never_began = [*command[:3], f"--out={tmp_path / 'new'}", *command[4:], "--stop-after=1"]
    (tmp_path / "new").mkdir()
    assert main(never_began) == 0


def train_ranks(parallel: Parallel, recipe, where: Options) -> None:
    loop.Run(recipe, where, "custom", parallel).train(StopRequest())


def test_two_ranks_resume_bit_equal(images, recipe, run_ranks, tmp_path):
    """With checkpoints at the same steps: each makes the ranks' running statistics one, which rounds."""
    for out, ends in (("whole", (7,)), ("cut", (4, 7))):
        for number, end in enumerate(ends):
            where = options(images, tmp_path / out, stop_after=end, save_every=2, resume=number > 0)
            run_ranks(2, train_ranks, recipe, where)
    one, other = (checkpoint.load(checkpoint.latest(tmp_path / out)) for out in ("whole", "cut"))
    assert one.step == other.step == 7 and differing(one.state, other.state) == []


def test_a_gpus_first_minute_is_told_by_the_first_rank_alone(capsys):
    gpu = torch.device("cuda", 0)
    ranks = {Parallel(device=gpu): True, Parallel(rank=1, world=2, device=gpu): False, Parallel(): False}
    for parallel, told in ranks.items():
        with loop._first_minute(parallel):
            assert capsys.readouterr().err == (loop.FIRST_MINUTE + "\n") * told
        assert re.fullmatch(r"ready after \d+ s\n" if told else "", capsys.readouterr().err)
    assert "about a minute the first time" in loop.FIRST_MINUTE


def test_threads_wait_briefly_for_each_other_while_a_run_trains():
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), loop._short_turns():
        assert sys.getswitchinterval() == pytest.approx(loop.TURN_SECONDS)
        raise KeyError
    assert sys.getswitchinterval() == before
