"""What a record says of the moment it was measured in is what was so."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmoco import environment


def test_the_moment_is_the_threads_load_and_time_of_now(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastmoco.environment.os.getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr("fastmoco.environment.cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    now = environment.moment()
    assert (now["threads"], now["load"], now["omp_num_threads"]) == (torch.get_num_threads(), 1.5, "7")
    assert re.fullmatch(r"\d\d:\d\d UTC", now["time"])
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment.moment()["omp_num_threads"] is None


def test_openmp_spins_briefly_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    for arguments in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(arguments, "")  # put back afterwards, set or not
        monkeypatch.delenv(arguments)
    environment.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == environment.SPIN
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    environment.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment.spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_launcher_says_so_before_torch_is_loaded():
    """The control: loaded first, torch's OpenMP has read its environment already."""
    code = "import os, sys, launch; launch.start(['env']); print('GOMP_SPINCOUNT' in os.environ)"
    watch = (
        "import sys; sys.addaudithook(lambda name, args: name == 'import' and args[0] == 'torch' and "
        "print('loaded with', __import__('os').environ.get('GOMP_SPINCOUNT')))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for first, actual in (("", environment.SPIN), ("import torch\n", "None")):
        output = subprocess.run(
            [sys.executable, "-c", watch + first + code], env=environ, capture_output=True, text=True
        )
        assert f"loaded with {actual}\n" in output.stdout, output.stderr


def test_a_copy_without_history_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTMOCO_COMMIT", "abc123")
    assert environment.commit() != "abc123"  # a checkout knows better
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastmoco" / "environment.py"))
    assert environment.commit() == "abc123"
    monkeypatch.delenv("FASTMOCO_COMMIT")
    assert environment.commit() == "none"


FAULTS = """
import ctypes, resource, sys
from fastmoco import environment
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    environment.keep_memory()
for _ in range(2):  # the second time nothing is new
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        memory = libc.malloc(1 << 26)
        ctypes.memset(memory, 1, 1 << 26)
        libc.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="tunes glibc")
@pytest.mark.parametrize(
    ("word", "variables", "kept"),
    [("keep", {}, True), ("leave", {}, False), ("keep", {"MALLOC_ARENA_MAX": "8"}, False)],
    ids=["kept", "control", "tuned by the environment"],
)
def test_freed_memory_is_kept(word: str, variables: dict[str, str], kept: bool):
    """Ten times 64 MiB, one after the other: 16,384 pages of 4 KiB each, or none."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, word], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    assert (int(result.stdout) < 1000) == kept
