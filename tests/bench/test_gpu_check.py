"""The check for a GPU: what it runs, in which order and time, what it leaves behind, and what it says of each part."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmoco.bench import gpu_check, record_files
from fastmoco.bench.gpu_check import SECONDS, TO_REPORT, Outcome, Part, done, parts, summary
from fastmoco.bench.record_files import Row
from fastmoco.options import Bench, BenchGpuCheck

H100 = "NVIDIA H100 80GB HBM3"
# Starts a process of its own, says which, and outlives every limit.
PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
    "open(sys.argv[1], 'w').write(f'{child.pid} '); time.sleep(100)"
)


def soon(seconds: float = 600) -> float:
    return time.perf_counter() + seconds


def python(code: str, *words: str, limit: int = 60, **more: object) -> Part:
    return Part("x", (sys.executable, "-c", code, *words), limit, **more)


def full(tmp_path: Path) -> list[Part]:
    return parts(BenchGpuCheck(records=tmp_path), H100, tmp_path)


def test_a_gate_comes_first_then_the_targets_then_the_rest(tmp_path):
    names = [part.name for part in full(tmp_path)]
    worth = ["gate: graph and step tests", "bench step", "bench step-32", "bench proof", "step picture"]
    assert names[:5] == worth and names[5:7] == ["kernel tests", "bench kernels"]
    rest = {"bench memory", "memcheck", "racecheck", "training", "bench loader", "bench train", "bench step-more"}
    assert rest | {"data, training and profile tests", "bench step-compiled"} == set(names[7:])


def test_what_the_targets_need_fits_the_time_whatever_happens(tmp_path):
    worst = sum(part.limit for part in full(tmp_path)[:5])
    assert worst <= SECONDS[False] - TO_REPORT - 60
    quick = parts(BenchGpuCheck(quick=True, records=tmp_path), H100, tmp_path)
    assert sum(part.limit for part in quick[:2]) <= SECONDS[True] - TO_REPORT - 20
    assert [part.name for part in quick] == ["gate: graph and step tests", "bench step", "bench proof"]


def test_each_part_has_a_record_of_its_own_and_a_quick_one_replaces_no_full_one(tmp_path):
    quick = parts(BenchGpuCheck(quick=True, records=tmp_path), H100, tmp_path)
    records = [part.record for part in [*full(tmp_path), *quick] if part.record]
    assert len(set(records)) == len(records) == 11
    assert all(path.parent == tmp_path and "-nvidia-h100-80gb-hbm3-" in path.name for path in records)
    (picture,) = [part.picture[1] for part in full(tmp_path) if part.picture]
    assert picture.parent == tmp_path and picture.name.endswith("-step.svg")


def test_a_command_that_is_recorded_names_no_path_of_this_machine():
    records = gpu_check.ROOT / "bench/records"
    inside = [part for part in parts(BenchGpuCheck(records=records), H100, Path("/scratch")) if part.record]
    assert not any(Path(word).is_absolute() for part in inside for word in part.command[1:])
    assert all(part.record.parent == records for part in inside)


def test_its_commands_name_files_flags_and_kernels_that_exist(tmp_path):
    from fastmoco.cli import parse

    quick = parts(BenchGpuCheck(quick=True, records=tmp_path), H100, tmp_path)
    for part in [*full(tmp_path), *quick]:
        for word in part.command:
            assert not word.startswith("tests/") or (gpu_check.ROOT / word).exists()
        if part.command[1:3] == ("-m", "fastmoco"):
            _, options = parse(part.command[3:])
            assert not isinstance(options, Bench) or options.json == part.record
    (memcheck,) = [part for part in full(tmp_path) if part.name == "memcheck"]
    kernels = {word.removeprefix("kne=") for word in memcheck.command if word.startswith("kne=")}
    assert {"_sweep_kernel", "_update_kernel", "apply", "convolve", "_color_kernel", "_enqueue_kernel"} <= kernels


def test_tests_are_spread_over_processes_where_xdist_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object())
    assert ("-n", "8") == gpu_check._tests("x", 1, 8, "tests").command[4:6]
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in gpu_check._tests("x", 1, 8, "tests").command


def test_a_part_that_fails_dawdles_or_is_missing_is_said():
    assert done(python("pass"), soon()).verdict == "passed"
    assert done(python("raise SystemExit(3)"), soon()).verdict == "exit code 3"
    assert done(python("import time; time.sleep(30)", limit=1), soon()).verdict == "more than 1 s"
    assert done(Part("x", ("no-such-tool-anywhere",), 1), soon()).verdict == "not installed"
    assert done(python("pass"), soon(-1)).verdict == "no time left"
    started = time.perf_counter()
    assert done(python("import time; time.sleep(30)"), soon(1)).verdict == "no time left after 1 s"
    assert time.perf_counter() - started < 10


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not happens():
        time.sleep(0.01)
    return happens()


def child(path: Path) -> int:
    return int(path.read_text())


def test_nothing_of_a_part_outlives_it(tmp_path):
    assert done(python(PARENT, str(tmp_path / "a"), limit=3), soon()).verdict == "more than 3 s"
    assert within(5, lambda: not alive(child(tmp_path / "a")))
    # The control: ending the process alone leaves its child behind.
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "b")])
    assert within(30, lambda: (tmp_path / "b").exists() and (tmp_path / "b").read_text().endswith(" "))
    parent.kill()
    parent.wait()
    time.sleep(0.1)
    assert alive(child(tmp_path / "b"))
    os.kill(child(tmp_path / "b"), signal.SIGKILL)


def saved(path: Path, rate: float) -> None:
    config, extra = {"arch": "resnet50", "px": 224, "batch": 256}, {"level": "bnrelu", "bounds": {}}
    row = Row("step", "fastmoco bf16", "pairs/s", (rate,) * 5, config, bound=rate / 0.7, extra=extra)
    facts = {**record_files.environment(), "device": H100, "device_type": "cuda", "unfinished": True}
    record_files.save(path, [record_files.record("step", [row], facts)])


def test_a_part_that_is_stopped_keeps_the_rows_it_had(tmp_path):
    record, source = record_files.partial(tmp_path / "a.json"), tmp_path / "b.json"
    saved(tmp_path / "a.json", 3000.0)  # of an earlier run
    saved(source, 4000.0)
    write = "import shutil, sys, time; shutil.copy(*sys.argv[1:]); time.sleep(100)"
    stopped = done(python(write, str(source), str(record), limit=3, record=tmp_path / "a.json"), soon())
    assert stopped.verdict == "more than 3 s"
    assert [row.median for item in stopped.records for row in item.rows] == [4000.0]
    text = summary([stopped])
    assert "| fastmoco bf16 | 4,000 pairs/s |" in text and "Stopped before its end" in text
    assert [row.median for item in record_files.load(tmp_path / "a.json") for row in item.rows] == [3000.0]


def test_a_record_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path):
    record = tmp_path / "a.json"
    for path in (record, record_files.partial(record)):
        saved(path, 4000.0)
        assert done(python("pass", record=record), soon()).records == [] and path.exists()


def test_the_picture_is_put_beside_the_records_once_it_is_there(tmp_path):
    drawn, place = tmp_path / "step.svg", tmp_path / "records" / "a-step.svg"
    draw = "import sys; open(sys.argv[1], 'w').write('<svg/>'); sys.exit(int(sys.argv[2]))"
    for code, there in (("1", False), ("0", True)):
        done(python(draw, str(drawn), code, picture=(drawn, place)), soon())
        assert place.exists() is there


def test_the_end_is_every_target_and_every_part():
    step, gate = Part("bench step", (), 1), Part("gate", (), 1)
    text = summary([Outcome(step, "exit code 1", 61.0, []), Outcome(gate, "passed", 9, [])])
    assert text.endswith("| bench step | exit code 1 | 61 |\n| gate | passed | 9 |")
    assert text.count("not measured") > 8 and "| met |" not in text and "| missed |" not in text


def test_where_the_gate_fails_or_was_not_run_no_target_is_met(tmp_path):
    saved(tmp_path / "a.json", 4000.0)
    step = Outcome(Part("bench step", (), 1), "passed", 61.0, record_files.load(tmp_path / "a.json"))
    gate = Part(full(tmp_path)[0].name, (), 1)
    assert "| met |" in summary([Outcome(gate, "passed", 9.0, []), step])
    failed = summary([Outcome(gate, "exit code 1", 9.0, []), step])
    for text, why in ((failed, "exit code 1"), (summary([step]), "not run")):
        assert "| met |" not in text and "| not proven |" in text
        assert f"The gate's tests did not pass ({why}): nothing below is proven" in text


def test_the_exit_code_says_whether_all_passed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    for code, expected in (("raise SystemExit(2)", 1), ("pass", 0)):
        monkeypatch.setattr(gpu_check, "parts", lambda *_, code=code: [python(code)])
        assert gpu_check.run(BenchGpuCheck(records=tmp_path)) == expected
    assert "| x | passed |" in capsys.readouterr().out
    # What there was no time for is no failure, whether it had begun or not; what took longer than it may is one.
    monkeypatch.setattr(gpu_check, "SECONDS", {False: TO_REPORT + 2})
    slow = python("import time; time.sleep(30)")
    for found, expected in (([python("pass"), slow, slow], 0), ([slow._replace(limit=1)], 1)):
        monkeypatch.setattr(gpu_check, "parts", lambda *_, found=found: found)
        assert gpu_check.run(BenchGpuCheck(records=tmp_path)) == expected
        assert ("No time was left for: x, x." in capsys.readouterr().out) is not expected


def test_asked_to_stop_it_ends_what_runs(monkeypatch, tmp_path):
    ask = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)
    monkeypatch.setattr(gpu_check, "parts", lambda *_: [python(ask)])
    before, started = signal.getsignal(signal.SIGTERM), time.perf_counter()
    try:
        with pytest.raises(SystemExit) as stopped:
            gpu_check.run(BenchGpuCheck(records=tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143 and time.perf_counter() - started < 30
