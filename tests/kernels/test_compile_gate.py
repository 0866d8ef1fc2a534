"""The compile gate, run as a user runs it; and proof that it fails where it should."""

import json
import os
import subprocess
import sys

import pytest

from fastmoco.kernels.compile_gate import Report, faults, resident_blocks

KERNELS = {"batch_norm", "batch_norm_pool", "enqueue", "info_nce", "photometric", "sgd_ema"}

SPILLING = """
import sys
import triton
import triton.language as tl
from fastmoco.kernels import compile_gate
from fastmoco.kernels.tiles import Variant

@triton.jit
def centre(x, y, size: tl.constexpr):
    index = tl.arange(0, size)
    held = tl.load(x + index)
    tl.store(y + index, held - tl.sum(held, 0))

signature = {"x": "*fp32", "y": "*fp32", "size": "constexpr"}
for arch in (80, 90, 100):
    for size in (32 * 288, 32 * 32):  # one warp: more numbers a thread than it has registers, and a few
        size = triton.next_power_of_2(size)
        variant = Variant("centre", centre, signature, {"size": size}, 1, 1)
        print(compile_gate.faults(compile_gate.examine(variant, arch)))
"""


def _python(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_passes_the_gate(tmp_path):
    done = _python(tmp_path, "-m", "fastmoco.kernels.compile_gate", "--json", "table.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = json.loads((tmp_path / "table.json").read_text())["kernels"]
    for arch in (80, 90, 100):
        compiled = [report for report in reports if report["arch"] == arch]
        assert {report["name"].split()[0].split(".")[0] for report in compiled} == KERNELS
        assert all(report["spill"] == report["stack"] == 0 for report in compiled)
        assert all(report["blocks"] >= 2 for report in compiled if report["streaming"])
    # What the gate asks of streaming kernels and of wgmma it can ask only of those that say what they are.
    streaming = {report["name"].split()[0].split(".")[0] for report in reports if report["streaming"]}
    assert streaming == KERNELS - {"info_nce"}
    wgmma = [report for report in reports if report["arch"] == 90 and report["name"].startswith("info_nce.sweep bf16")]
    assert wgmma
    assert all(report["mma"]["wgmma"] and report["wide_loads"] for report in wgmma)


def test_a_spilling_kernel_fails_and_a_small_one_passes(tmp_path):
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    done = _python(tmp_path, script)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr[-3000:]
    assert all("spills" in line for line in lines[::2]), lines
    assert lines[1::2] == ["[]"] * 3


def test_interpreter_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastmoco.kernels.compile_gate"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode
    assert "unset TRITON_INTERPRET" in done.stderr


SOUND = dict(
    name="probe",
    arch=90,
    registers=64,
    spill=0,
    stack=0,
    shared=0,
    blocks=4,
    mma={"wgmma": 1},
    wide_loads=1,
    streaming=True,
    native_mma=True,
    serialized=False,
)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill": 4}, "spills 4 bytes"),
        ({"stack": 8}, "stack 8"),
        ({"blocks": 1}, "single resident block"),
        ({"blocks": 0}, "does not fit"),
        ({"mma": {"wgmma": 0}}, "no wgmma"),
        ({"serialized": True}, "serialized"),
    ],
)
def test_each_fault_is_named(change, fault):
    assert faults(Report(**SOUND)) == []
    (found,) = faults(Report(**{**SOUND, **change}))
    assert found.startswith("sm_90 probe: ")
    assert fault in found


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "columns", "blocks"),
    [
        (90, 32, 0, 4, 0, 16),  # 2048 threads / 128
        (90, 32, 0, 1, 0, 32),  # never more than 32 blocks
        (90, 168, 0, 8, 0, 1),  # 8 warps x 5376 registers, of 65536
        (90, 128, 0, 8, 0, 2),
        (80, 32, 81 * 1024, 4, 0, 2),  # each with 1 KB of the driver's: 164 KB exactly
        (80, 32, 82 * 1024, 4, 0, 1),
        (80, 32, 164 * 1024, 4, 0, 0),
        (100, 32, 0, 4, 256, 2),
        (100, 32, 0, 4, 512, 1),
        (90, 32, 0, 4, 256, 0),  # Hopper has no tensor memory
    ],
)
def test_resident_blocks(arch, registers, shared, warps, columns, blocks):
    assert resident_blocks(arch, registers, shared, warps, columns) == blocks
