"""The commands of bench: sizes, subjects, files; small enough to run everywhere."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmoco.bench import command, record_files
from fastmoco.bench.options import Bench
from fastmoco.bench.record_files import Row
from fastmoco.cli import main

CPU = torch.device("cpu")
TINY = "--arch resnet18 --batch-size 32 --crop-size 16 --queue-size 64 --rounds 2 --device cpu".split()


@pytest.mark.parametrize(("name", "text"), [("a.pngx", "use a name that ends in .svg, .png, .pdf"), ("a", "--svg ")])
def test_outputs_are_checked_before_anything_is_measured(name, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.SUBJECTS, "memory", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", "memory", *TINY, "--svg", str(tmp_path / name)]) == 2
    assert text in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["bench", "memory", *TINY, "--csv", str(tmp_path / "file" / "a.csv")]) == 2


@pytest.mark.parametrize(
    ("subject", "more"),
    [
        ("step", ["--only", "fp32"]),
        ("loader", ["--skip", "file reader,photometric"]),
        ("memory", ["--only", "info_nce"]),
    ]
    + [pytest.param("train", [], marks=pytest.mark.slow), pytest.param("step", [], marks=pytest.mark.slow)],
)
def test_a_subject_prints_bound_share_and_baseline_and_its_record_passes_the_schema(
    subject, more, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["fastmoco", "bench", subject])
    file, table, chart = (tmp_path / f"a.{ending}" for ending in ("json", "csv", "svg"))
    flags = ["--json", str(file), "--csv", str(table), "--svg", str(chart)]
    assert main(["bench", subject, *TINY, *more, *flags]) == 0
    (item,) = record_files.load(file)
    assert item.subject == subject and len(item.rows) >= 2
    assert {row.baseline for row in item.rows} < {row.provider for row in item.rows} | {None}
    if subject != "memory":
        assert all(row.bound is not None and len(row.samples) == 2 for row in item.rows)
    output, errors = capsys.readouterr()
    assert f"measuring {subject} ...\n" in errors
    env = item.environment
    for part in (env["device"], env["commit"], "share of bound", f"`fastmoco bench {subject}`"):
        assert part in output
    assert len(table.read_text().splitlines()) == 1 + len(item.rows)
    assert chart.read_text().startswith("<?xml") and "fastmoco" in chart.read_text()


@pytest.mark.slow
def test_scaling_measures_each_number_of_ranks(tmp_path):
    file = tmp_path / "a.json"
    assert main(["bench", "scaling", *TINY, "--json", str(file)]) == 0
    rows = record_files.load(file)[0].rows
    assert [row.provider for row in rows] == ["1 rank", "2 ranks"][: len(rows)]
    assert rows[-1].bound == pytest.approx(len(rows) * sorted(rows[0].samples)[len(rows[0].samples) // 2])


def test_only_chooses_providers_and_names_them_where_none_is_left(capsys, tmp_path):
    file = tmp_path / "a.json"
    flags = [*TINY, "--only", "published fp32", "--json", str(file)]
    assert main(["bench", "step", *flags]) == 0
    assert [row.provider for row in record_files.load(file)[0].rows] == ["published fp32"]
    assert main(["bench", "step", *TINY, "--only", "fp32", "--skip", "fp32"]) == 2
    assert main(["bench", "step", *TINY, "--only", "nonsense"]) == 2
    assert "published fp32; published bf16 autocast" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_busy_processes_run_while_a_subject_is_measured_and_not_after(fails, monkeypatch, tmp_path):
    """Rows say so, and are not those of a machine without them; also where the measurement fails."""
    started: list[subprocess.Popen] = []

    class Spy(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if command.SPIN in self.args:
                started.append(self)

    def measured(*_: object) -> list[Row]:
        assert len(started) == 2 and all(each.poll() is None for each in started)
        if fails:
            raise ValueError("no figure")
        return [Row("step", "ours", "pairs/s", (1.0, 2.0), {"px": 16})]

    monkeypatch.setattr(command.subprocess, "Popen", Spy)
    monkeypatch.setitem(command.SUBJECTS, "step", measured)
    file = tmp_path / "a.json"
    with pytest.raises(ValueError, match="no figure") if fails else nullcontext():
        command.run(Bench(("step",), json=file, device="cpu", busy=2))
        assert record_files.load(file)[0].rows[0].config == {"px": 16, "busy": 2}
    assert all(each.poll() is not None for each in started)


def test_busy_processes_end_where_bench_is_killed():
    """They hold the output of their parent, which is read to its end only when the last of them is gone."""
    work = "import time; from fastmoco.bench import command\n"
    work += "with command._busy(2): print('busy', flush=True); time.sleep(60)"
    bench = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, process_group=0)
    try:
        assert bench.stdout is not None and bench.stdout.readline() == b"busy\n"
        bench.kill()
        bench.communicate(timeout=20)
    finally:
        with suppress(ProcessLookupError):  # raised where all of them are gone
            os.killpg(bench.pid, signal.SIGKILL)


def test_busy_processes_end_where_another_one_cannot_be_started(monkeypatch):
    started: list[subprocess.Popen] = []

    def start(arguments: list[str]) -> subprocess.Popen:
        if started:
            raise OSError("no more processes")
        started.append(subprocess.Popen(arguments))
        return started[0]

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=start))
    with pytest.raises(OSError, match="no more"), command._busy(2):
        pass
    ended = started[0].poll() is not None
    started[0].kill()
    assert ended


def save_record(path: Path, scale: float, batch: int = 32) -> str:
    samples = tuple(scale * (1 + 0.01 * i) for i in range(9))
    row = Row("step", "ours", "ms", samples, {"batch": batch})
    record_files.save(path, [record_files.record("step", [row], record_files.environment())])
    return str(path)


def test_compare_reads_two_records_and_gives_a_verdict(tmp_path, capsys):
    before, after = save_record(tmp_path / "a.json", 1.0), save_record(tmp_path / "b.json", 1.3)
    assert main(["bench", "compare", before, after]) == 0
    assert "| slower |" in capsys.readouterr().out
    assert main(["bench", "compare", before, before]) == 0
    assert "| same |" in capsys.readouterr().out


def test_compare_says_in_one_line_why_it_cannot(tmp_path, capsys):
    before, other = save_record(tmp_path / "a.json", 1.0), save_record(tmp_path / "b.json", 1.0, batch=64)
    assert main(["bench", "compare", before, str(tmp_path / "none.json")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    assert main(["bench", "compare", before, other]) == 2
    output = capsys.readouterr().err
    assert "a.json, holds step (batch 32) by ours" in output and "b.json, holds step (batch 64) by ours" in output
    assert output.count("\n") == 1


def test_report_rewrites_the_readme_from_the_records(tmp_path, capsys):
    readme, records = tmp_path / "README.md", tmp_path / "records"
    readme.write_text("a\n<!-- bench -->\n<!-- /bench -->\nb\n")
    page = tmp_path / "records.md"
    flags = ["--readme", str(readme), "--records", str(records), "--page", str(page)]
    assert main(["bench", "report", *flags]) == 2
    assert "holds no records" in capsys.readouterr().err
    save_record(records / "x.json", 1.0)
    assert main(["bench", "report", *flags]) == 0
    assert "step (batch 32):\n\n| provider |" in page.read_text() and "| ours |" in page.read_text()
    assert "not measured yet" in readme.read_text() and readme.read_text().endswith("b\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["tune", "gpu-check"])
def test_what_needs_a_gpu_says_so_in_one_line(name, capsys):
    assert main(["bench", name]) == 2
    output = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in output and output.count("\n") == 1


def test_the_committed_records_pass_the_schema():
    paths = list((Path(__file__).parents[2] / "bench/records").glob("*.json"))
    assert paths and all(record_files.load(path)[0].rows for path in paths)


def test_scaling_model_counts_instead_of_measuring_and_goes_with_nothing_else(capsys):
    assert main(["bench", "scaling", "--model", "--arch", "resnet18"]) == 0
    out = capsys.readouterr().out
    assert "resnet18, 224 px" in out and "| 512 | fastmoco | all |" in out
    assert main(["bench", "step", "--model"]) == 2
    assert "bench scaling --model" in capsys.readouterr().err


def test_a_benchmark_that_is_stopped_keeps_what_it_has_and_one_that_fails_says_so(tmp_path, capsys, monkeypatch):
    from fastmoco.bench import step

    file, countdown = tmp_path / "a.json", iter(range(6))

    def stopped() -> None:
        if next(countdown, None) is None:
            raise KeyboardInterrupt

    providers = {"slow": step.Provider(lambda: stopped, "fp32"), "bad": step.Provider(lambda: 1 / 0, "fp32")}
    monkeypatch.setattr(step, "providers", lambda *_: providers)
    monkeypatch.setattr("fastmoco.bench.timing.SHORTEST_SAMPLE", 0.0)
    flags = ["bench", "step", *TINY, "--rounds", "9", "--json", str(file)]
    assert main(flags) == 130
    assert not file.exists()
    (item,) = record_files.load(record_files.partial(file))
    assert item.environment["unfinished"] and [len(row.samples) for row in item.rows] == [4]
    assert "Stopped before its end" in record_files.table([item])
    providers["slow"] = step.Provider(lambda: lambda: None, "fp32")
    assert main(flags) == 1
    (item,) = record_files.load(file)
    assert "unfinished" not in item.environment and [len(row.samples) for row in item.rows] == [9]
    assert not record_files.partial(file).exists()
    assert "bad failed: ZeroDivisionError: division by zero" in capsys.readouterr().out
    # Again, and stopped early: the complete record stays.
    providers["slow"], countdown = step.Provider(lambda: stopped, "fp32"), iter(range(3))
    assert main(flags) == 130
    assert [len(row.samples) for row in record_files.load(file)[0].rows] == [9]
    assert [len(row.samples) for row in record_files.load(record_files.partial(file))[0].rows] == [1]


def test_the_record_of_a_finished_subject_stays_where_the_next_one_fails(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    row = Row("memory", "a", "MB", (1.0,))
    monkeypatch.setitem(command.SUBJECTS, "memory", lambda *_: [row])
    monkeypatch.setitem(command.SUBJECTS, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["bench", "memory", "step", *TINY, "--json", str(file)])
    assert [item.rows for item in record_files.load(record_files.partial(file))] == [(row,)] and not file.exists()


def test_proof_runs_only_where_asked_for_and_tells_what_it_compared(capsys):
    assert "proof" not in command.MEASURED and set(command.MEASURED) < set(command.SUBJECTS)
    assert main(["bench", "proof", *TINY]) == 0
    out = capsys.readouterr().out
    assert "captured nothing, on a CPU" in out and "steps 2):" in out and "| graph | 0 tensors differ |" in out
