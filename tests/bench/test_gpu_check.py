"""The check for a GPU, run: how parts are carried out, what they leave behind, and what is said of each."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmoco.bench import gpu_check, record_files
from fastmoco.bench.gpu_check import (
    NO_GATE,
    NO_TEST,
    NOT_INSTALLED,
    TO_REPORT,
    Outcome,
    run_part,
    run_parts,
    summary,
)
from fastmoco.bench.gpu_plan import GATE, Form, Part, PlannedPart
from fastmoco.bench.options import BenchGpuCheck
from fastmoco.bench.record_files import Row
from fastmoco.options import UsageError

H100 = "NVIDIA H100 80GB HBM3"
# Starts a process of its own, says which, and outlives every limit.
PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
    "open(sys.argv[1], 'w').write(f'{child.pid} '); time.sleep(100)"
)


def soon(seconds: float = 600) -> float:
    return time.perf_counter() + seconds


def python(code: str, *words: str, limit: int = 60, name: str = "x", **more: object) -> PlannedPart:
    form = Form(limit, limit, (sys.executable, "-c", code, *words))
    return PlannedPart(Part(name, (form,), **more), form)


def test_a_part_that_fails_or_dawdles_is_said(tmp_path):
    assert run_part(python("pass"), soon(), tmp_path).verdict == "passed"
    assert run_part(python("raise SystemExit(3)"), soon(), tmp_path).verdict == "exit code 3"
    assert run_part(python("import time; time.sleep(30)", limit=1), soon(), tmp_path).verdict == "more than 1 s"
    assert run_part(python("pass"), soon(-1), tmp_path).verdict == "no time left"
    start = time.perf_counter()
    assert run_part(python("import time; time.sleep(30)"), soon(1), tmp_path).verdict == "no time left after 1 s"
    assert time.perf_counter() - start < 10


def test_tests_that_were_all_skipped_have_not_passed(tmp_path):
    """pytest ends with 0 there. A gate of which nothing ran is none; what is no run of pytest is left alone."""
    skipped, some = ("print('==== %s in 1.2s ====')" % words for words in ("5 skipped", "3 passed, 5 skipped"))
    assert run_part(python(skipped, tests=True), soon(), tmp_path).verdict == NO_TEST
    assert run_part(python(some, tests=True), soon(), tmp_path).verdict == "passed"
    assert run_part(python(skipped), soon(), tmp_path).verdict == "passed"
    found = run_parts(each(python(skipped, name=GATE, tests=True), python("pass")), soon(), tmp_path)
    assert [item.verdict for item in found] == [NO_TEST, NO_GATE]
    assert not gpu_check.harmless(found[0])


def each(*planned: PlannedPart) -> list[Part]:
    return [one.part for one in planned]


def test_a_part_that_overruns_costs_only_itself(tmp_path, monkeypatch):
    """The control is the limit: without it the parts behind would have no time left."""
    slow, quick = (python(f"import time; time.sleep({seconds})", limit=3) for seconds in (60, 0))
    verdicts = [item.verdict for item in run_parts(each(quick, slow, quick), soon(600), tmp_path)]
    assert verdicts == ["passed", "more than 3 s", "passed"]
    monkeypatch.setattr(gpu_check, "WORTH_STARTING", 1)
    unlimited = python("import time; time.sleep(60)", limit=600)
    verdicts = [item.verdict for item in run_parts(each(unlimited, unlimited), soon(3), tmp_path)]
    assert verdicts == ["no time left after 3 s", "no time left"]


def test_what_a_part_does_not_need_of_its_limit_gives_the_next_one_more(tmp_path):
    forms = tuple(Form(limit, 1, (sys.executable, "-c", f"print({limit})")) for limit in (50, 90))
    first, second = python("pass", name="a", limit=50).part, Part("b", forms)
    planned, _ = gpu_check.gpu_plan.fit([first, second], 110)
    assert [one.form.limit for one in planned] == [50, 50]
    assert [item.verdict for item in run_parts([first, second], soon(110), tmp_path)] == ["passed"] * 2
    assert (tmp_path / "b.log").read_text() == "90\n"


def test_what_was_not_planned_is_run_while_time_is_left(tmp_path):
    """It comes last, whatever its place; too late, it is not begun."""
    order = each(python("pass", name="long", limit=1000), python("pass"))
    found = run_parts(order, soon(600), tmp_path)
    assert [(item.part.name, item.verdict) for item in found] == [("x", "passed"), ("long", "passed")]
    late = run_parts([python("pass", limit=1).part, order[0]], soon(gpu_check.WORTH_STARTING - 1), tmp_path)
    assert [item.verdict for item in late] == ["passed", "no time left"]


@pytest.mark.parametrize(("code", "then"), [("pass", "passed"), ("raise SystemExit(1)", NO_GATE)])
def test_behind_a_gate_that_does_not_pass_nothing_is_run(tmp_path, code, then):
    outcomes = run_parts(each(python(code, name=GATE), *[python("pass")] * 2), soon(600), tmp_path)
    assert [item.verdict for item in outcomes[1:]] == [then] * 2


def test_what_a_part_says_is_shown_and_kept(tmp_path, capsys):
    run_part(python("print('one'); import sys; print('two', file=sys.stderr)"), soon(), tmp_path)
    assert sorted((tmp_path / "x.log").read_text().split()) == ["one", "two"]
    assert {"one", "two"} <= set(capsys.readouterr().out.split())


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
    assert run_part(python(PARENT, str(tmp_path / "a"), limit=3), soon(), tmp_path).verdict == "more than 3 s"
    assert within(5, lambda: not alive(child(tmp_path / "a")))
    # The control: ending the process alone leaves its child behind.
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "b")])
    assert within(30, lambda: (tmp_path / "b").exists() and (tmp_path / "b").read_text().endswith(" "))
    parent.kill()
    parent.wait()
    time.sleep(0.1)
    assert alive(child(tmp_path / "b"))
    os.kill(child(tmp_path / "b"), signal.SIGKILL)


def save_record(path: Path, rate: float) -> None:
    config, extra = {"arch": "resnet50", "px": 224, "batch": 256}, {"level": "bnrelu", "bounds": {}}
    row = Row("step", "fastmoco bf16", "pairs/s", (rate,) * 5, config, bound=rate / 0.7, extra=extra)
    facts = {**record_files.environment(), "device": H100, "device_type": "cuda", "unfinished": True}
    record_files.save(path, [record_files.record("step", [row], facts)])


def test_a_part_that_is_stopped_keeps_the_rows_it_had(tmp_path):
    record, source = record_files.partial(tmp_path / "a.json"), tmp_path / "b.json"
    save_record(tmp_path / "a.json", 3000.0)  # of an earlier run
    save_record(source, 4000.0)
    write = "import shutil, sys, time; shutil.copy(*sys.argv[1:]); time.sleep(100)"
    stopped = run_part(python(write, str(source), str(record), limit=3, record=tmp_path / "a.json"), soon(), tmp_path)
    assert stopped.verdict == "more than 3 s"
    assert [row.median for item in stopped.records for row in item.rows] == [4000.0]
    text = summary([stopped])
    assert "| fastmoco bf16 | 4,000 pairs/s |" in text and "Stopped before its end" in text
    assert [row.median for item in record_files.load(tmp_path / "a.json") for row in item.rows] == [3000.0]


def test_a_record_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path):
    record = tmp_path / "a.json"
    for path in (record, record_files.partial(record)):
        save_record(path, 4000.0)
        assert run_part(python("pass", record=record), soon(), tmp_path).records == [] and path.exists()


def test_the_picture_is_put_beside_the_records_once_it_is_there(tmp_path):
    picture, place = tmp_path / "step.svg", tmp_path / "records" / "a-step.svg"
    draw = "import sys; open(sys.argv[1], 'w').write('<svg/>'); sys.exit(int(sys.argv[2]))"
    for code, there in (("1", False), ("0", True)):
        run_part(python(draw, str(picture), code, picture=(picture, place)), soon(), tmp_path)
        assert place.exists() is there


def test_the_end_is_every_target_and_every_part():
    step, gate = (Part(name, ()) for name in ("step", GATE))
    text = summary([Outcome(step, "exit code 1", 61.0, []), Outcome(gate, "passed", 9, [])])
    assert text.endswith("| step | exit code 1 | 61 |\n| gate | passed | 9 |")
    assert text.count("not measured") > 8 and "| met |" not in text and "| missed |" not in text


def test_where_the_gate_fails_or_was_not_run_no_target_is_met(tmp_path):
    save_record(tmp_path / "a.json", 4000.0)
    step = Outcome(Part("step", ()), "passed", 61.0, record_files.load(tmp_path / "a.json"))
    gate = Part(GATE, ())
    assert "| met |" in summary([Outcome(gate, "passed", 9.0, []), step])
    failed = summary([Outcome(gate, "exit code 1", 9.0, []), step])
    for text, why in ((failed, "exit code 1"), (summary([step]), "not run")):
        assert "| met |" not in text and "| not proven |" in text
        assert f"The gate's tests did not pass ({why}): nothing below is proven" in text


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)


def use_plan(monkeypatch: pytest.MonkeyPatch, *plan: PlannedPart) -> None:
    monkeypatch.setattr(gpu_check.gpu_plan, "parts", lambda *_: [one.part for one in plan])


def test_the_exit_code_says_whether_all_passed(monkeypatch, tmp_path, capsys, with_a_gpu):
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    slow = python("import time; time.sleep(30)", limit=1, name="slow")
    missing = python("pass", name="missing", needs="no.such.module")
    # What is not installed, or what there was no time for, is no failure; what took longer than it may is one.
    for plan, expected in (([python("pass")], 0), ([python("raise SystemExit(2)")], 1), ([missing], 0), ([slow], 1)):
        use_plan(monkeypatch, *plan)
        assert gpu_check.run(BenchGpuCheck(records=tmp_path)) == expected
    said = capsys.readouterr().out
    assert f"| missing | {NOT_INSTALLED} | 0 |" in said
    last = [line for line in said.splitlines() if line.startswith("VERDICTS")]
    assert last == [f"VERDICTS: {what}" for what in ("passed: x", "exit code 2: x", "not installed: missing")] + [
        "VERDICTS: more than 1 s: slow"
    ]
    use_plan(monkeypatch, python("pass", limit=4), python("pass", name="y", limit=1000))
    assert gpu_check.run(BenchGpuCheck(records=tmp_path, minutes=(TO_REPORT + 5) / 60)) == 0
    assert "No time was left for: y." in capsys.readouterr().out


def test_everything_is_packed_into_one_archive(monkeypatch, tmp_path, capsys, with_a_gpu):
    """Records, also of what was stopped, the picture, what each part said, the tables; nothing of an earlier run."""
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    save_record(tmp_path / "source.json", 4000.0)
    copy = "import shutil, sys, time; shutil.copy(*sys.argv[1:3]); print('copied'); time.sleep(float(sys.argv[3]))"
    whole, cut, old = (tmp_path / f"2026-01-01-h100-{name}.json" for name in ("a", "b", "c"))
    half = str(record_files.partial(cut))
    save_record(old, 1.0)
    picture, place = tmp_path / "step.svg", tmp_path / "h100-step.svg"
    draw = "import sys; open(sys.argv[1], 'w').write('<svg/>')"
    use_plan(
        monkeypatch,
        python(copy, str(tmp_path / "source.json"), str(whole), "0", name="a", record=whole),
        python(copy, str(tmp_path / "source.json"), half, "60", name="b", limit=4, record=cut),
        python("pass", name="c", record=old, needs="no.such.module"),
        python(draw, str(picture), name="d", picture=(picture, place)),
    )
    archive = tmp_path / "out" / "all.tar.gz"
    assert gpu_check.run(BenchGpuCheck(records=tmp_path, archive=archive)) == 1
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        output = tar.extractfile("summary.md").read().decode()
        verdicts = json.load(tar.extractfile("verdicts.json"))
    logs = {f"{name}.log" for name in "abd"}
    assert {name: each["verdict"] for name, each in verdicts.items()} == {
        "a": "passed", "b": "more than 4 s", "c": NOT_INSTALLED, "d": "passed"
    }  # fmt: skip
    assert names == {"summary.md", "verdicts.json", whole.name, record_files.partial(cut).name, place.name} | logs
    assert "| b | more than 4 s |" in output and output.strip() in capsys.readouterr().out


def test_the_archive_is_there_after_each_part(monkeypatch, tmp_path, with_a_gpu):
    """A machine that is taken away during the second part leaves what the first one said."""
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    archive = tmp_path / "all.tar.gz"
    look = "import sys, tarfile; print(*sorted(tarfile.open(sys.argv[1]).getnames()))"
    use_plan(monkeypatch, python("print('one')", name="a"), python(look, str(archive), name="b"))
    assert gpu_check.run(BenchGpuCheck(records=tmp_path, archive=archive)) == 0
    with tarfile.open(archive) as tar:
        assert tar.extractfile("b.log").read().split() == [b"a.log", b"summary.md", b"verdicts.json"]


def test_an_archive_that_cannot_be_written_costs_no_part(monkeypatch, tmp_path, capsys, with_a_gpu):
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    use_plan(monkeypatch, python("pass", name="a"), python("print('ran')", name="b"))
    monkeypatch.setattr(gpu_check, "summary", lambda outcomes: 1 / 0 if len(outcomes) < 2 else "tables")
    assert gpu_check.run(BenchGpuCheck(records=tmp_path)) == 0
    said = capsys.readouterr()
    assert "ran" in said.out and "was not written: division by zero" in said.err


def test_a_dry_run_prints_the_plan_and_runs_nothing(monkeypatch, tmp_path, capsys):
    use_plan(monkeypatch, python("open('ran', 'w')", limit=30), python("pass", name="y", limit=1000))
    assert gpu_check.run(BenchGpuCheck(records=tmp_path / "none", minutes=2, dry_run=True)) == 0
    output = capsys.readouterr().out
    assert "The limits add up to 30 of 115 s" in output and "Only if time is left: y." in output
    assert "== x" not in output and not (tmp_path / "none").exists()


def test_without_a_gpu_it_says_what_can_be_done_here(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="needs an NVIDIA GPU.*--dry-run.*--rehearse"):
            gpu_check.run(BenchGpuCheck(records=tmp_path))


def test_asked_to_stop_it_ends_what_runs(monkeypatch, tmp_path, with_a_gpu):
    ask = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    use_plan(monkeypatch, python(ask))
    before, start = signal.getsignal(signal.SIGTERM), time.perf_counter()
    try:
        with pytest.raises(SystemExit) as stopped:
            gpu_check.run(BenchGpuCheck(records=tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143 and time.perf_counter() - start < 30


SCRIPT = gpu_check.ROOT / "bench/gpu15.sh"


def test_the_three_calls_name_parts_that_exist_and_each_fits_its_minutes(tmp_path):
    from fastmoco.bench import gpu_plan

    by_name = {one.name: one for one in gpu_plan.parts(tmp_path, "h100", tmp_path)}
    calls = re.findall(r'; check (\d) "\$\{2:-([\d.]+)\}" (\S+) ;;', SCRIPT.read_text())
    assert [call[0] for call in calls] == ["1", "2", "3"]
    for _, minutes, names in calls:
        plan, rest = gpu_plan.fit([by_name[name] for name in names.split(",")], 60 * float(minutes) - TO_REPORT)
        assert {one.name for one in rest} <= {"kernel-tests"}  # which gets what the others leave
    assert [call[2].split(",")[0] for call in calls] == [GATE, "step-32", "decode"]
    assert sum(float(call[1]) for call in calls) <= 12.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_call_of_the_script_is_rehearsed(tmp_path):
    """The second call, at a toy size, into a folder of results: one archive, and exit code 0."""
    environment = {**os.environ, "REHEARSE": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    environment["RECORDS"] = str(tmp_path / "records")
    result = subprocess.run([SCRIPT, "2"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    with tarfile.open(tmp_path / "gpu15-2.tar.gz") as tar:
        assert {"summary.md", "step-32.log", "picture.log"} <= set(tar.getnames())
    assert subprocess.run([SCRIPT], capture_output=True).returncode == 2
