"""Profiles: kernels are found in their part of the step, own times add up, Nsight's command lines can be run."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastmoco import profile
from fastmoco.bench.timing import Machine
from fastmoco.cli import main
from fastmoco.contrast.parts import PARTS
from fastmoco.contrast.step import Step
from fastmoco.options import Profile, UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

TINY = dict(arch="resnet18", width=0.125, batch_size=32, crop_size=32, queue_size=64, dim=16)
SIZE = "--arch resnet18 --batch-size 32 --crop-size 16 --queue-size 64 --device cpu --steps 1".split()


def span(name: str, start: float, length: float, **more) -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": length, "cat": "cpu_op", "tid": 1, **more}


def test_an_operator_keeps_what_its_callees_leave_it():
    events = [
        span("outer", 0, 100), span("inner", 10, 30), span("innermost", 15, 5), span("inner", 50, 40),
        span("elsewhere", 20, 7, tid=2), span("loss", 0, 60, cat="user_annotation"),
    ]  # fmt: skip
    rows = {(row.name, row.part): row for row in profile.kernels(events)}
    assert rows[("outer", "loss")].seconds == pytest.approx(30e-6)
    assert rows[("inner", "loss")].seconds == pytest.approx(65e-6) and rows[("inner", "loss")].calls == 2
    assert rows[("innermost", "loss")].seconds == pytest.approx(5e-6)
    assert rows[("elsewhere", "loss")].seconds == pytest.approx(7e-6)
    assert sum(row.seconds for row in rows.values()) == pytest.approx(107e-6)


def test_a_kernel_belongs_to_the_part_that_launched_it_however_late_it_runs():
    events = [
        span("update", 0, 10, cat="user_annotation"), span("enqueue", 20, 10, cat="user_annotation"),
        span("cuLaunchKernel", 5, 1, cat="cuda_driver", args={"correlation": 1}),
        span("cudaLaunchKernel", 25, 1, cat="cuda_runtime", args={"correlation": 2}),
        span("_update_kernel", 22, 6, cat="kernel", args={"correlation": 1}, tid=7),
        span("_enqueue_kernel", 90, 3, cat="kernel", args={"correlation": 2}, tid=7),
        span("cast", 95, 1, cat="kernel", args={"correlation": 3}, tid=7),
        span("aten::add", 2, 2),
    ]  # fmt: skip
    found = [(row.name, row.part, row.calls) for row in profile.kernels(events)]
    assert found == [("_update_kernel", "update", 1), ("_enqueue_kernel", "enqueue", 1), ("cast", "other", 1)]


def test_the_torch_profile_writes_a_trace_a_picture_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "measure_machine", lambda *_, **__: Machine("toy", 1e9, 1e10))
    assert main(["profile", "v2", *SIZE, "--out", str(tmp_path), "--rows", "5"]) == 0
    shown = capsys.readouterr().out
    parts, kernels = shown.split("| kernel |")
    assert all(f"| {part} |" in parts for part in PARTS) and kernels.count("\n|") == 1 + 5
    assert "share of bound" in shown and "1 step on CPU, fp32" in shown
    with gzip.open(tmp_path / profile.TRACE, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "user_annotation"} >= set(PARTS)
    assert "backward" in (tmp_path / profile.PICTURE).read_text()


def test_every_part_has_a_cost(monkeypatch):
    monkeypatch.setattr(profile, "measure_machine", lambda *_, **__: Machine("toy", 1e9, 1e10))
    costs = profile.costs_of_parts(Step(Recipe(**TINY), Parallel()))
    assert costs.keys() == set(PARTS)
    assert costs["backward"].flops > costs["query encoder"].flops == costs["key encoder"].flops > costs["loss"].flops
    assert all(cost.seconds >= max(cost.nbytes / 1e9, cost.flops / 1e10) * (1 - 1e-9) for cost in costs.values())
    encoders = [Step(Recipe(**{**TINY, "arch": "resnet50"}), Parallel(), encoder=how) for how in ("fused", "fused-key")]
    plain, fused = map(profile.costs_of_parts, encoders)
    assert [part for part in PARTS if plain[part] != fused[part]] == ["key encoder"]
    assert plain["key encoder"].nbytes > fused["key encoder"].nbytes


def node(name: str, *children: dict, **metrics: float) -> dict:
    return {"frame": {"name": name, "type": "function"}, "children": list(children), "metrics": metrics}


def timed(name: str, count: int, nanoseconds: int) -> dict:
    return node(name, **{"count": count, "time (ns)": nanoseconds})


TREE = node(
    "ROOT", node("backward", timed("dgrad", 4, 3000), node("inside", timed("dgrad", 2, 500))),
    node("enqueue", timed("_enqueue_kernel", 2, 40)), timed("memset", 1, 10), node("update"), count=0,
)  # fmt: skip


def test_protons_kernels_belong_to_the_part_above_them():
    rows = [(row.name, row.part, row.calls, round(1e9 * row.seconds)) for row in profile.leaves(TREE)]
    assert rows == [("dgrad", "backward", 6, 3500), ("_enqueue_kernel", "enqueue", 2, 40), ("memset", "other", 1, 10)]


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


def test_proton_is_told_the_parts_and_finished_also_where_a_step_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(profile.torch.cuda, "synchronize", lambda: None)
    step, proton = Step(Recipe(**TINY), Parallel()), Proton()
    batch = profile.noise_batch(step.recipe, step.parallel)
    rows = profile.counted(proton, lambda: step.step(batch, 1e-3), 1, tmp_path / "step.hatchet")
    assert rows == profile.leaves(TREE)
    assert proton.calls[0] == "start shadow" and proton.calls[-1] == "finalize"
    assert set(proton.calls[1:-1]) == set(PARTS)
    proton = Proton()
    with pytest.raises(ZeroDivisionError):
        profile.counted(proton, lambda: 1 / 0, 1, tmp_path / "step.hatchet")
    assert proton.calls == ["start shadow", "finalize"]
    with pytest.raises(UsageError, match="switched off"):
        profile.counted(Proton(None), lambda: None, 1, tmp_path / "step.hatchet")


def test_proton_without_a_gpu_is_one_line(tmp_path, capsys):
    assert main(["profile", "v2", "--tool", "proton", *SIZE, "--out", str(tmp_path / "out")]) == 2
    assert "--tool proton needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not profile.torch.cuda.is_available(), reason="needs a GPU")
def test_proton_tells_the_parts_of_a_step_apart_on_a_gpu(tmp_path, capsys):
    on_gpu = [word if word != "cpu" else "cuda" for word in SIZE]
    assert main(["profile", "v2", "--tool", "proton", *on_gpu, "--out", str(tmp_path)]) == 0
    assert (tmp_path / profile.TREE).exists()
    lines = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    assert all(" 0.00 |" not in lines[part] for part in ("query encoder", "backward"))


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_nsights_command_is_printed_and_runs_the_same_steps(tool, capsys, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert main(["profile", "v2", "--tool", tool, "--arch", "resnet18", "--key-stream"]) == 0
    line, note = capsys.readouterr().out.splitlines()
    assert line.startswith(f"FASTMOCO_NSIGHT=1 {tool} ") and f"{tool} is not installed here" in note
    options = Profile(tool=tool, arch="resnet18", key_stream=True, steps=2)
    command = profile.nsight_command("v2", options)
    words = command[command.index("fastmoco") + 1 :]
    assert words[:4] == ["profile", "v2", "--tool", "torch"]
    assert {"--key-stream", "--arch"} <= set(words) and words.count("--steps") == 1


def test_real_images_can_be_profiled(tmp_path, capsys, monkeypatch):
    from fastmoco.bench.loader import photographs

    monkeypatch.setattr(profile, "measure_machine", lambda *_, **__: Machine("toy", 1e9, 1e10))
    (tmp_path / "images").mkdir()
    images = photographs(tmp_path / "images", 40)
    assert main(["profile", "demo", "--data", str(images), *SIZE, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / profile.TRACE).exists()
    assert main(["profile", "demo", "--data", str(tmp_path / "none"), *SIZE]) != 0
    assert "none" in capsys.readouterr().err
