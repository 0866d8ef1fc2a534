"""Profiles: every step is marked and timed, tables say what was recorded, Nsight's command lines can be run."""

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from fastmoco import terminal
from fastmoco.bench import profiler
from fastmoco.bench.options import Profile
from fastmoco.bench.timeline import Row, leaves
from fastmoco.bench.timing import Machine
from fastmoco.cli import main
from fastmoco.contrast.parts import PARTS
from fastmoco.contrast.step import Step
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

TINY = dict(arch="resnet18", width=0.125, batch_size=32, crop_size=32, queue_size=64, dim=16)
SIZE = "--arch resnet18 --batch-size 32 --crop-size 16 --queue-size 64 --device cpu --steps 1".split()
TOY = Machine("toy", 1e9, 1e10)
CPU = torch.device("cpu")


def test_the_torch_profile_writes_a_trace_a_picture_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profiler, "measure_machine", lambda *_, **__: TOY)
    assert main(["profile", "v2", *SIZE, "--precision", "fp32", "--out", str(tmp_path), "--rows", "5"]) == 0
    output = capsys.readouterr().out
    parts, kernels = output.split("| kernel |")
    assert all(f"| {part} |" in parts for part in PARTS) and kernels.count("\n|") == 1 + 5
    assert "v2: resnet18, 32 pairs of 16 px, 64 keys\nfp32 on CPU, 1 torch thread;" in output
    assert "the machine's rates, measured right after the steps: 1.0 GB/s and 10.0 GFLOP/s" in output
    with gzip.open(tmp_path / profiler.TRACE, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "user_annotation"} == {
        *PARTS,
        "step 1",
    }
    picture = (tmp_path / profiler.PICTURE).read_text()
    assert "backward" in picture and "fp32 on CPU, 1 torch thread" in picture


def test_nothing_is_written_unasked_and_a_terminal_gets_its_width(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profiler, "measure_machine", lambda *_, **__: TOY)
    monkeypatch.setattr(profiler.terminal, "lay_out", lambda text: terminal.fit(text, 80))
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "v2", *SIZE]) == 0
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "--out FOLDER keeps the trace" in shown
    assert max(map(len, shown.splitlines())) <= 80 and "backward" in shown


def test_a_share_above_the_bound_is_explained():
    rows = [Row("add", "backward", 2, 0.5, (0.25, 0.25))]
    for seconds, explained in ((0.2, False), (0.26, True)):
        costs = {"backward": profiler.Cost(1e6, 0, seconds)}
        lines = profiler.table_of_parts(profiler.Recording(rows, [1.0, 1.0]), costs, TOY)
        assert (profiler.OVER in lines) is explained


def test_every_step_is_marked_and_timed_on_its_own(monkeypatch):
    clock, marks = iter([5.0, 6.0, 8.0, 8.5]), []
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: next(clock))
    mark = lambda name: marks.append(name) or nullcontext()  # noqa: E731
    assert profiler.time_steps(lambda: marks.append("trained"), 3, CPU, mark) == [1.0, 2.0, 0.5]
    assert marks == ["step 1", "trained", "step 2", "trained", "step 3", "trained"]


class Event:
    """Stands for torch.cuda.Event on a device that needs ten seconds more for every event."""

    moments = iter([10.0, 20.0, 30.0])

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.moment = next(self.moments)

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.moment - self.moment)


def test_on_a_gpu_the_device_is_the_clock_and_is_awaited_once(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("awaited"))
    assert profiler.time_steps(lambda: events.append("trained"), 2, torch.device("cuda")) == [10.0, 10.0]
    assert events == ["trained", "trained", "awaited"]


def test_a_trace_tells_the_steps_apart(tmp_path):
    x, repeats = torch.zeros(8), iter([1, 5, 2])
    recording = profiler.trace(lambda: [x.add(1) for _ in range(next(repeats))], 3, CPU, tmp_path / "trace.json.gz")
    (row,) = [row for row in recording.rows if row.name == "aten::add"]
    assert (row.part, row.calls) == ("other", 8) and len(row.by_step) == len(recording.seconds) == 3
    assert all(0 < inside < wall for inside, wall in zip(row.by_step, recording.seconds, strict=True))
    assert sum(row.by_step) == pytest.approx(row.seconds)


def test_the_pace_is_the_median_and_says_so_where_steps_differ():
    steady = profiler.Recording([Row("gemm", "loss", 3, 0.6)], [0.2, 0.3, 0.25])
    assert profiler.pace(steady, 32) == [
        "3 steps: 200.0 ms of kernels a step in the mean",
        "wall time a step, under the profiler: median 250.0 ms (200.0 to 300.0), 128.0 pairs/s at the median",
    ]
    *_, warning = profiler.pace(steady._replace(seconds=[0.2, 1.24, 0.25]), 32)
    assert warning == "unsteady: the slowest step took 6.2 times the fastest; measure again on a quiet machine"


def test_parts_have_their_range_over_the_steps_and_speeds_in_units_that_fit():
    rows = [
        Row("gemm", "backward", 4, 3.0, (1.0, 2.0)),
        Row("add", "backward", 2, 0.5, (0.25, 0.25)),
        Row("_enqueue_kernel", "enqueue", 2, 5e-4),
    ]
    costs = {"backward": profiler.Cost(3.5e5, 6.8e7, 0.35), "enqueue": profiler.Cost(1e6, 0, 1e-4)}
    lines = profiler.table_of_parts(profiler.Recording(rows[:2], [1.5, 2.5]), costs, TOY)
    assert "| backward | 1,750.0 | 1,250.0 to 2,250.0 | 100.0% | 200.0 kB/s | 38.9 MFLOP/s | 20.0% |" in lines
    assert "| enqueue | 0.000 | - | 0.0% | - | - | - |" in lines
    lines = profiler.table_of_parts(profiler.Recording(rows[2:], [1.0, 1.0]), costs, TOY)
    assert "| enqueue | 0.250 | - | 100.0% | 4.0 GB/s | - | 40.0% |" in lines


def test_the_picture_says_what_it_shows_and_has_no_exponents(tmp_path):
    recording = profiler.Recording([Row("gemm", "backward", 1, 1.16), Row("add", "loss", 1, 0.29)], [1.5])
    costs = {"backward": profiler.Cost(1, 1, 0.58), "loss": profiler.Cost(1, 1, 0.029)}
    profiler.draw(recording, costs, "v2: resnet18\nfp32 on CPU", tmp_path / "step.svg")
    picture = (tmp_path / "step.svg").read_text()
    for text in ("v2: resnet18", "fp32 on CPU", "backward 1,160.0 ms (80.0%)", "loss 290.0 ms (20.0%)"):
        assert f"<!-- {text} -->" in picture
    assert "<!-- 50% of its bound -->" in picture and "<!-- 10% of its bound -->" in picture


def test_every_part_has_a_cost():
    costs = profiler.costs_of_parts(Step(Recipe(**TINY), Parallel()), TOY)
    assert costs.keys() == set(PARTS)
    padded = profiler.costs_of_parts(Step(Recipe(**TINY), Parallel(), channels=4), TOY)
    assert padded["photometric"] == costs["photometric"]  # nobody has to write a fourth channel of zeros
    assert costs["backward"].flops > costs["query encoder"].flops == costs["key encoder"].flops > costs["loss"].flops
    assert all(cost.seconds >= max(cost.nbytes / 1e9, cost.flops / 1e10) * (1 - 1e-9) for cost in costs.values())


TREE = {
    "frame": {"name": "ROOT"},
    "metrics": {},
    "children": [{"frame": {"name": "gemm"}, "metrics": {"count": 2, "time (ns)": 40}, "children": []}],
}


class Proton:
    """Stands for triton.profiler, which needs a GPU: writes TREE, and notes what it is asked for."""

    def __init__(self, session: int | None = 0) -> None:
        self.session, self.calls = session, []

    def start(self, name: str, *, context: str) -> int | None:
        self.path = Path(f"{name}.hatchet")
        self.calls.append(f"start {context}")
        return self.session

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        yield

    def finalize(self) -> None:
        self.calls.append("finalize")
        self.path.write_text(json.dumps([TREE, {"CUDA": {}}]))


def test_proton_is_told_the_parts_and_finished_also_where_a_step_fails(tmp_path):
    step, proton = Step(Recipe(**TINY), Parallel()), Proton()
    batch = profiler.noise_batch(step.recipe, step.parallel)
    recording = profiler.count_kernels(proton, lambda: step.step(batch, 1e-3), 1, CPU, tmp_path / "step.hatchet")
    assert recording.rows == leaves(TREE) and len(recording.seconds) == 1
    assert proton.calls[0] == "start shadow" and proton.calls[-1] == "finalize"
    assert set(proton.calls[1:-1]) == set(PARTS)
    proton = Proton()
    with pytest.raises(ZeroDivisionError):
        profiler.count_kernels(proton, lambda: 1 / 0, 1, CPU, tmp_path / "step.hatchet")
    assert proton.calls == ["start shadow", "finalize"]
    with pytest.raises(UsageError, match="switched off"):
        profiler.count_kernels(Proton(None), lambda: None, 1, CPU, tmp_path / "step.hatchet")


def test_proton_without_a_gpu_is_one_line(tmp_path, capsys):
    assert main(["profile", "v2", "--tool", "proton", *SIZE, "--out", str(tmp_path / "out")]) == 2
    assert "--tool proton needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_proton_tells_the_parts_of_a_step_apart_on_a_gpu(tmp_path, capsys):
    on_gpu = [word if word != "cpu" else "cuda" for word in SIZE]
    assert main(["profile", "v2", "--tool", "proton", *on_gpu, "--out", str(tmp_path)]) == 0
    assert (tmp_path / profiler.TREE).exists()
    output = capsys.readouterr().out
    lines = {line.split(" | ")[0][2:]: line for line in output.splitlines() if line.startswith("| ")}
    assert "wall time a step" in output and all(" 0.000 |" not in lines[part] for part in ("query encoder", "backward"))


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_nsights_command_is_printed_and_runs_the_same_steps(tool, capsys, monkeypatch):
    monkeypatch.setattr(profiler.shutil, "which", lambda name: None)
    for has_gpu, why in ((False, "nothing for Nsight to record here"), (True, f"{tool} is not installed here")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert main(["profile", "v2", "--tool", tool, "--arch", "resnet18", "--key-stream", "--out", "profile"]) == 0
        line, meaning, note = capsys.readouterr().out.splitlines()
        assert line.startswith(f"FASTMOCO_NSIGHT=1 {tool} ") and " python -m fastmoco profile v2 " in line
        assert meaning.startswith("FASTMOCO_NSIGHT=1: ") and why in note
    assert main(["profile", "v2", "--tool", tool]) == 2 and "--out is missing" in capsys.readouterr().err
    options = Profile(tool=tool, arch="resnet18", key_stream=True, steps=2, out=Path("profile"))
    command = profiler.nsight_command("v2", options)
    words = command[command.index("fastmoco") + 1 :]
    assert words[:4] == ["profile", "v2", "--tool", "torch"]
    assert {"--key-stream", "--arch"} <= set(words) and words.count("--steps") == 1
    # ncu runs every kernel many times over, and must leave the card's clocks alone.
    assert (tool == "ncu") is ("--clock-control=none" in command and "--launch-count=100" in command)


def test_nsight_runs_this_python(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tool = tmp_path / "nsys"
    tool.write_text('#!/bin/sh\necho "$FASTMOCO_NSIGHT" "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    profiler.run("v2", Profile(tool="nsys", out=tmp_path / "out"))
    *_, ran = capfd.readouterr().out.splitlines()
    assert ran.startswith("1 profile ") and f" {sys.executable} -m fastmoco profile v2 " in ran
    tool.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(UsageError, match="nsys ended with exit code 3"):
        profiler.run("v2", Profile(tool="nsys", out=tmp_path / "out"))


def test_steps_for_nsight_without_a_gpu_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTMOCO_NSIGHT", "1")
    assert main(["profile", "v2", *SIZE, "--out", str(tmp_path / "out")]) == 2
    assert "nothing for Nsight to record here" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_real_images_can_be_profiled(tmp_path, capsys, monkeypatch):
    from fastmoco.bench.loader import photographs

    monkeypatch.setattr(profiler, "measure_machine", lambda *_, **__: TOY)
    (tmp_path / "images").mkdir()
    images = photographs(tmp_path / "images", 40)
    assert main(["profile", "demo", "--data", str(images), *SIZE, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / profiler.TRACE).exists()
    assert main(["profile", "demo", "--data", str(tmp_path / "none"), *SIZE]) != 0
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "negatives"), [("simclr-cifar", "62 keys"), ("bank", "64 keys")])
def test_every_dictionary_can_be_profiled(preset: str, negatives: str, tmp_path: Path, capsys) -> None:
    sizes = {"batch_size": 32, "crop_size": 16, "queue_size": 64 if preset == "bank" else None}
    profiler.run(preset, Profile(out=tmp_path, steps=1, device="cpu", arch="resnet18", **sizes))
    output = capsys.readouterr().out
    assert f"{preset}: resnet18, 32 pairs of 16 px, {negatives}" in output and "| loss |" in output
