"""The monitor: sums are right, lines are whole, nothing is drawn where nobody looks."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.runs.lines import Lines, read_lines, truncate
from fastmoco.train.curves import draw_curves
from fastmoco.train.expectation import chance_level, expectation, fill_level
from fastmoco.train.metrics import BadStep, Meter, Pace, Stopwatch
from fastmoco.train.monitor import Monitor

V1, CIFAR, DEMO = (PRESETS[name][1] for name in ("v1", "cifar", "demo"))


def row(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def line(step: int, **changes: float) -> dict[str, float]:
    facts = {"loss": 5.0, "top1": 10.0, "top5": 20.0, "lr": 0.03, "pairs_per_s": 100.0, "data_wait": 0.25}
    return {"step": step, "epoch": step / 10, **facts, "memory": 1.5, "queue_filled": 1.0, **changes}


def test_the_meter_averages_each_interval_alone():
    meter = Meter(torch.device("cpu"))
    meter.add(row(1.0, 10.0, 20.0, 0.0, 0.5))
    meter.add(row(3.0, 30.0, 40.0, 0.0, 0.7))
    assert meter.steps == 2
    meter.cut(2, Parallel(), {"lr": 0.5})
    assert meter.steps == 0
    [reading] = meter.read()
    spread = reading.line.pop("spread")
    assert reading.line == {"step": 2, "loss": 2.0, "top1": 20.0, "top5": 30.0, "nonfinite": 0, "lr": 0.5}
    assert spread == pytest.approx(0.6) and reading.finite == 2 and reading.faults == []


def test_a_step_that_is_not_finite_is_named_and_left_out_of_the_means():
    meter = Meter(torch.device("cpu"))
    for loss, bad in ((1.0, 0.0), (math.nan, 1.0), (3.0, 0.0), (7.0, 1.0)):
        meter.add(row(loss, 10.0, 20.0, bad, 0.5))
    assert meter.nonfinite()
    meter.cut(14, Parallel(), {})
    assert meter.nonfinite()
    [reading] = meter.read()
    assert reading.line["loss"] == 2.0 and reading.line["nonfinite"] == 2 and reading.finite == 2
    assert reading.faults == [BadStep(12, (0,)), BadStep(14, ())]
    assert str(reading.faults[0]) == "the loss of rank 0 became infinite or NaN in step 12"
    assert not meter.nonfinite() and list(meter.read(everything=True)) == []


def test_an_evaluation_of_many_images_does_not_begin_in_silence(tmp_path):
    stream = io.StringIO()
    monitor = Monitor(tmp_path, 10, stream=stream)
    monitor.knn_begins(0, 2000)
    assert stream.getvalue() == ""
    monitor.knn_begins(0, 5000)
    monitor.close()
    assert stream.getvalue() == "kNN of 5000 images after step 0 ...\n"


def test_the_rank_whose_loss_is_bad_is_named(run_ranks):
    """On either rank, and the means are over both."""
    for bad in (0, 1):
        for reading in run_ranks(2, read_two_steps, bad):
            assert reading.faults == [BadStep(2, (bad,))] and reading.line["loss"] == 0.5 and reading.finite == 1


def read_two_steps(parallel: Parallel, bad: int):
    meter = Meter(parallel.device)
    meter.add(row(float(parallel.rank), 0.0, 0.0, 0.0, 1.0))
    meter.add(row(math.nan if parallel.rank == bad else 1.0, 0.0, 0.0, 1.0, 1.0))
    meter.cut(2, parallel, {})
    [reading] = meter.read()
    return reading


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path, monkeypatch):
    messages = []
    lines = Lines(tmp_path / "log.jsonl", messages.append)
    lines.append({"step": 1})
    file = lines._file

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    lines._file = Full()
    lines.append({"step": 2})
    lines.append({"step": 3})
    lines._file = file
    lines.append({"step": 4})
    lines.close()
    assert [each["step"] for each in read_lines(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    assert len(messages) == 1 and "No space left" in messages[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads a GPU one interval late")
def test_on_a_gpu_an_interval_is_read_when_the_next_one_ends_and_nothing_waits():
    device = torch.device("cuda", 0)
    meter, parallel = Meter(device), Parallel(device=device)
    metrics = [torch.ones((), device=device)] * 5
    meter.add(metrics)
    meter.cut(0, parallel, {})
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.add(metrics)
        meter.cut(1, parallel, {})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [read.line["step"] for read in meter.read()] == [0]
    assert [read.line["step"] for read in meter.read(everything=True)] == [1]


def test_the_share_of_data_wait(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    watch.add_wait(1.0)
    now[0] = 104.0
    assert watch.lap(pairs=200) == {"pairs_per_s": 50.0, "data_wait": 0.25}
    now[0] = 110.0
    watch.skip()  # six seconds of evaluation are no training
    now[0] = 112.0
    assert watch.lap(pairs=200) == {"pairs_per_s": 100.0, "data_wait": 0.0}


def test_the_host_is_at_most_two_steps_ahead_of_a_gpu(monkeypatch):
    waits, calls = [], []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking  # a waiting host spins otherwise, on a core that decodes images
            calls.append(self)

        def record(self) -> None: ...

        def synchronize(self) -> None:
            waits.append(calls.index(self) + 1)

    monkeypatch.setattr("torch.cuda.Event", Event)
    pace, on_cpu = Pace(torch.device("cuda", 0)), Pace(torch.device("cpu"))
    for step in range(1, 6):
        pace.step()
        on_cpu.step()
        assert waits == list(range(1, step - Pace.AHEAD + 1))
    assert len(calls) == 5


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    monitor = Monitor(tmp_path, total=20, stream=stream)
    monitor.advance()
    monitor.interval(line(10))
    monitor.knn({"step": 10, "top1": 51.25, "top5": 90.0, "classes": 10})
    monitor.close()
    output = stream.getvalue()
    assert "\r" not in output and len(output.splitlines()) == 2
    assert "step 10/20" in output and "loss 5.000" in output and "data wait 25%" in output and "top-1 51.25%" in output
    [logged] = read_lines(tmp_path / "log.jsonl")
    assert logged.pop("seconds") >= 0 and logged == line(10)


def test_a_bar_on_a_terminal(tmp_path):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monitor = Monitor(tmp_path, total=20, start=5, stream=stream)
    monitor.advance()
    monitor.interval(line(10))
    monitor.close()
    assert "/20" in stream.getvalue() and "loss 5.000" in stream.getvalue() and "\r" in stream.getvalue()


@pytest.mark.parametrize("columns", [40, 80, 100, 220])
@pytest.mark.parametrize("step", [10, 123_456])
def test_a_bar_shows_whole_figures_at_any_width(tmp_path, columns, step):
    """The most telling ones first; what a narrow terminal has no room for is in the log."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monitor = Monitor(tmp_path, total=1_000_000, start=step, stream=stream)
    monitor._bar.dynamic_ncols = lambda file: (columns, 24)
    monitor.interval(line(step, loss=10.123, top1=0.1))
    shown = stream.getvalue().split("\r")[-1]
    monitor.close()
    assert len(shown.rstrip()) <= columns
    if columns >= 80:
        assert "loss 10.123" in shown and shown.rstrip().endswith("]"), shown
    assert ("1.5 GiB]" in shown) == (columns == 220)


def test_a_bar_that_is_told_all_figures_loses_its_end(tmp_path, monkeypatch):
    """The control."""
    monkeypatch.setattr(Monitor, "_room_for", lambda monitor, figures: len(figures))
    with pytest.raises(AssertionError):
        test_a_bar_shows_whole_figures_at_any_width(tmp_path, 80, 10)


def test_every_line_is_on_disk_at_once(tmp_path):
    monitor = Monitor(tmp_path, total=20, stream=io.StringIO())
    monitor.interval(line(10))
    assert read_lines(tmp_path / "log.jsonl")[0]["step"] == 10
    monitor.close()


def test_a_resumed_log_has_no_line_twice_and_no_half_line(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = [json.dumps({**line(step), "seconds": step / 2}) for step in (10, 20, 30)]
    path.write_text("\n".join([*whole, '{"step": 4']))
    monitor = Monitor(tmp_path, total=40, start=20, stream=io.StringIO())
    monitor.interval(line(30))
    monitor.close()
    lines = read_lines(path)
    assert [each["step"] for each in lines] == [10, 20, 30] and path.read_text().endswith("}\n")
    assert lines[-1]["seconds"] >= 10.0, "time goes on where it stopped"
    truncate(tmp_path / "none.jsonl", 5)
    assert not (tmp_path / "none.jsonl").exists()


def test_chance_levels():
    assert chance_level(V1) == pytest.approx(11.0904, abs=5e-5)  # facts of the published queue sizes
    assert chance_level(CIFAR) == pytest.approx(8.3180, abs=5e-5)
    text = expectation(V1, steps_per_epoch=5004)
    assert "11.090" in text and "256 steps" in text and "0.051 epochs" in text
    assert "128 steps" in expectation(replace(V1, symmetric=True), 5004)


@pytest.mark.parametrize(
    ("preset", "level", "words"),
    [
        ("simclr", 9.0108, ("ln(2B-1) = 9.011", "falls below it within the first epochs")),
        ("end-to-end", 6.9315, ("ln(B) = 6.931",)),
        ("bank", 11.0904, ("ln(K+1) = 11.090", "first epoch (5004 steps)", "random vectors")),
    ],
)
def test_each_dictionary_has_its_own_chance_and_expectation(preset, level, words):
    recipe = PRESETS[preset][1]
    assert chance_level(recipe) == pytest.approx(level, abs=5e-5)
    assert all(word in expectation(recipe, 5004) for word in words)


def test_what_is_random_at_first_is_full_after_a_turn_an_epoch_or_at_once():
    assert [fill_level(PRESETS["v1"][1], 100, step) for step in (0, 128, 256, 300)] == [0, 0.5, 1, 1]
    assert [fill_level(PRESETS["bank"][1], 100, step) for step in (0, 50, 100, 300)] == [0, 0.5, 1, 1]
    assert fill_level(PRESETS["simclr"][1], 100, 0) == 1


def test_the_line_names_the_dictionary_that_fills(tmp_path):
    for dictionary, message in (("queue", "queue 100%"), ("bank", "bank 100%"), ("batch", "data wait")):
        stream = io.StringIO()
        monitor = Monitor(tmp_path, total=40, dictionary=dictionary, stream=stream)
        monitor.interval(line(10))
        monitor.close()
        assert message in stream.getvalue() and ("100%" in stream.getvalue()) == (dictionary != "batch")


def test_tensorboard_gets_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tmp_path, total=20, tensorboard=True, stream=io.StringIO())
    monitor.interval(line(10))
    monitor.knn({"step": 10, "top1": 51.0, "top5": 90.0, "classes": 10})
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "top1", "lr", "pairs_per_s", "data_wait", "knn_top1"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 5.0)]


def test_the_curves_are_drawn_from_the_logs(tmp_path):
    """Without lines, with them, and with kNN: three pictures that differ where they should. kNN is a third panel."""
    pictures = []
    for lines, neighbours in (([], []), ([10, 20, 30], []), ([10, 20, 30], [0, 30])):
        log = [line(step, loss=3 + step / 10) for step in lines]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
        knn = [{"step": step, "top1": 40.0 + step, "top5": 90.0, "classes": 10} for step in neighbours]
        (tmp_path / "knn.jsonl").write_text("".join(json.dumps(each) + "\n" for each in knn))
        pictures.append(np.asarray(Image.open(draw_curves(tmp_path, DEMO)).convert("RGB")).astype(int))
    empty, logged, evaluated = pictures
    third = evaluated.shape[1] // 3
    assert empty.shape == logged.shape and 3 * empty.shape[1] == 2 * evaluated.shape[1]
    blue = np.abs(logged - np.array([0x2F, 0x6D, 0xB5])).sum(2) < 30
    assert blue[:, :third].sum() > 100 and (np.abs(empty - np.array([0x2F, 0x6D, 0xB5])).sum(2) < 30).sum() == 0
    assert (np.abs(evaluated[:, 2 * third :] - np.array([0x3A, 0x8A, 0x5F])).sum(2) < 30).sum() > 100
