"""The check for a GPU: what it runs, within which time, and what it says of a part that fails."""

import sys
import time
from pathlib import Path

from fastmoco.bench.gpu_check import Part, _done, parts
from fastmoco.options import BenchGpuCheck


def test_it_fits_its_time_and_tests_before_it_times(tmp_path):
    full = parts(BenchGpuCheck(), "NVIDIA H100 80GB HBM3", tmp_path)
    names = [part.name for part in full]
    assert names.index("kernel tests") < names.index("memcheck") < names.index("training") < names.index("bench step")
    assert {"bench step", "bench step-32", "bench kernels", "bench loader", "bench train", "bench memory"} <= set(names)
    records = [part.record for part in full if part.record]
    assert all(path.name.endswith(".json") and "-nvidia-h100-80gb-hbm3-" in path.name for path in records)
    assert len(set(records)) == len(records) == 7
    quick = parts(BenchGpuCheck(quick=True), "H100", tmp_path)
    assert {part.name for part in quick} < set(names)


def test_a_part_that_fails_dawdles_or_is_missing_is_said(tmp_path):
    def verdict(code: str, limit: int = 60) -> str:
        return _done(Part("x", (sys.executable, "-c", code), limit), end).verdict

    end = time.perf_counter() + 600

    assert verdict("pass") == "passed"
    assert verdict("raise SystemExit(3)") == "exit code 3"
    assert verdict("import time; time.sleep(30)", 1) == "more than 1 s"
    assert _done(Part("x", ("no-such-tool-anywhere",), 1), end).verdict == "not installed"
    end = time.perf_counter() - 1
    assert verdict("pass") == "no time left"


def test_its_commands_name_files_that_exist(tmp_path):
    root = Path(__file__).parents[2]
    for part in parts(BenchGpuCheck(), "H100", tmp_path):
        for word in part.command:
            if word.startswith("tests/"):
                assert (root / word).exists()
