"""The compile gate, run as a user runs it; and proof that it fails where it should."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import KernelInterface

from fastmoco.bench.roofline import convolutions
from fastmoco.encoder import build_encoder
from fastmoco.kernels import batch_norm as batch_norm_module
from fastmoco.kernels import batch_norm_plan, compile_gate
from fastmoco.kernels.batch_norm import Norm, batch_norm_act, batch_norm_act_twice
from fastmoco.kernels.compile_gate import Report, faults, resident_blocks
from fastmoco.kernels.dispatch import INTERPRETED_PROCESSORS, Machine
from fastmoco.kernels.sgd_ema import TensorTable, sgd_ema
from fastmoco.kernels.sgd_ema import variants as sgd_ema_variants
from fastmoco.presets import PRESETS

KERNELS = {"batch_norm", "batch_norm_pool", "enqueue", "info_nce", "nt_xent", "photometric", "sgd_ema"}

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
    result = _python(tmp_path, "-m", "fastmoco.kernels.compile_gate", "--json", "table.json")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    reports = json.loads((tmp_path / "table.json").read_text())["kernels"]
    for arch in (80, 90, 100):
        compiled = [report for report in reports if report["arch"] == arch]
        assert {report["name"].split()[0].split(".")[0] for report in compiled} == KERNELS
        assert all(report["spill"] == report["stack"] == 0 for report in compiled if not report["odd"])
        assert all(report["blocks"] >= 2 for report in compiled if report["streaming"] and not report["odd"])
    # What the gate asks of streaming kernels and of wgmma it can ask only of those that say what they are.
    streaming = {report["name"].split()[0].split(".")[0] for report in reports if report["streaming"]}
    assert streaming == KERNELS - {"info_nce", "nt_xent"}
    wgmma = [report for report in reports if report["arch"] == 90 and report["name"].startswith("info_nce.sweep bf16")]
    assert wgmma
    assert all(report["mma"]["wgmma"] and report["wide_loads"] for report in wgmma)


def test_a_spilling_kernel_fails_and_a_small_one_passes(tmp_path):
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    result = _python(tmp_path, script)
    lines = result.stdout.splitlines()
    assert len(lines) == 6, result.stderr[-3000:]
    assert all("spills" in line for line in lines[::2]), lines
    assert lines[1::2] == ["[]"] * 3


def test_interpreter_is_refused(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "fastmoco.kernels.compile_gate"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode
    assert "unset TRITON_INTERPRET" in result.stderr


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
    odd=False,
    instructions=100,
    loop=40,
    waits_late=False,
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
        ({"waits_late": True}, "before it waits"),
    ],
)
def test_each_fault_is_named(change, fault):
    assert faults(Report(**SOUND)) == faults(Report(**{**SOUND, "odd": True, "spill": 4, "blocks": 1})) == []
    (actual,) = faults(Report(**{**SOUND, **change}))
    assert actual.startswith("sm_90 probe: ")
    assert fault in actual


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


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 BRA 0x60 ;                   /* forward: no loop */
        /*0020*/                   FADD R2, R2, R3 ;            /* 0x0000000302027221 */
        /*0030*/                   ISETP.NE.AND P1, PT, R4, 0x0, PT ;
        /*0040*/               @P1 BRA 0x20 ;                   /* 0xfffffffc00f41947 */
        /*0050*/                   FMUL R2, R2, R2 ;
        /*0060*/               @P2 BRA 0x10 ;                   /* the longer one, around the first */
        /*0070*/                   EXIT ;                       /* 0x000000000000794d */
        /*0080*/                   BRA 0x80;                    /* 0xfffffffc00fc7947 */
        /*0090*/                   NOP;                         /* 0x0000000000007918 */
"""


def test_instructions_and_the_longest_loop_are_counted():
    assert compile_gate.count_instructions(LISTING) == (9, 6)
    assert compile_gate.count_instructions(LISTING.replace("@P2 BRA 0x10", "@P2 BRA 0x70")) == (9, 3)
    assert compile_gate.count_instructions("") == (0, 0)


@pytest.mark.parametrize(
    ("code", "late"),
    [
        ("S2R R0, SR_TID.X; ACQBULK; LDG.E.128 R4, [R2]; EXIT", False),
        ("LDC R1, c[0x0][0x28]; ACQBULK; PREEXIT; STG.E [R2], R4", False),
        ("LDG.E R4, [R2]; ACQBULK; STG.E [R2], R4", True),
        ("RED.E.ADD [R2], R4; ACQBULK", True),
        ("LDG.E R4, [R2]; STG.E [R2], R4", True),  # never waits
    ],
)
def test_a_kernel_that_touches_memory_before_it_waits_is_found(code, late):
    listing = "\n".join(f"        /*{16 * n:04x}*/   {text} ;" for n, text in enumerate(code.split("; ")))
    assert compile_gate.waits_late(listing) is late


def test_what_changed_since_an_earlier_run_is_told():
    now = [Report(**SOUND), Report(**SOUND | {"name": "new", "spill": 8}), Report(**SOUND | {"arch": 80})]
    before = [{**SOUND, "loop": 50, "registers": 80}, {**SOUND, "name": "gone"}]
    rows = compile_gate.changes(before, now).splitlines()
    assert rows[0] == "| kernel | sm_80 | sm_90 |" and len(rows) == 4
    plain = "100, loop 40, regs 64, blocks 4"
    assert rows[2] == f"| probe | {plain} | 100, loop 50 -> 40, regs 80 -> 64, blocks 4 |"
    assert rows[3] == f"| new | - | {plain}, spill 8 |"


SIZES = (256, 64, 5)  # channels: those that the gate compiles, and an odd number


@pytest.fixture
def launches(monkeypatch):
    """What every launch of a kernel would be compiled for, in place of running it: kernel, arguments, options."""
    records = []

    def watched(kernel, grid):
        def launch(*given, **options):
            arguments = dict(zip(kernel.arg_names, given, strict=False))
            arguments |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
            records.append((kernel, arguments, options))

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", watched)
    return records


def normalise_layers(channels: int) -> None:
    """Every form of batch norm, forward and backward."""
    samples, pixels = (6, 3) if channels % 2 else (32, 4)
    x, side = (torch.randn(samples, channels, pixels, pixels).bfloat16() for _ in range(2))
    x, side = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, side))
    running = (torch.zeros(channels), torch.ones(channels))
    norm = Norm(torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True), running)
    for options in ({}, {"residual": side}, {"residual": side, "residual_norm": norm}):
        batch_norm_act(x, *norm, 2, **options, impl="triton").float().sum().backward()
        if options:
            one, other = batch_norm_act_twice(x, *norm, 2, **options, impl="triton")
            (one + other).float().sum().backward()


def step_tensors() -> None:
    q, velocity, k = ([torch.randn(4096)] for _ in range(3))
    table = TensorTable(q, velocity, k, [q[0].bfloat16()], [k[0].bfloat16()])
    flag, lr = torch.zeros(1, dtype=torch.int32), torch.tensor(0.1)
    sgd_ema(table, [torch.randn(4096).bfloat16()], lr, 0.9, 1e-4, 0.99, flag, impl="triton")


def compiled_for(kernel, arguments: dict, options: dict) -> tuple:
    """What Triton makes a binary of at a launch: types, what is known of each argument, constants, options."""
    free = kernel.kwargs["do_not_specialize"] or ()
    signature, known = {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if kernel.fn.__annotations__.get(name) in (tl.constexpr, "tl.constexpr") or value is None:
            signature[name] = "constexpr"
            continue
        kind, fact = native_specialize_impl(BaseBackend, value, False, name not in free, name not in free)
        signature[name] = kind
        if fact and kind != "constexpr":
            known[position,] = BaseBackend.parse_attr(fact)
    constants = {name: arguments.get(name) for name, kind in signature.items() if kind == "constexpr"}
    return signature, known, constants, options


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="without the interpreter no tensor of a CPU is taken")
def test_a_launch_compiles_what_the_gate_compiles(launches, monkeypatch):
    """Types, alignment of every argument, constants and options; at odd sizes all but the constants, which follow."""
    monkeypatch.setattr(batch_norm_plan, "machine", lambda device: Machine((9, 0), INTERPRETED_PROCESSORS))
    for channels in SIZES:
        normalise_layers(channels)
    step_tensors()
    gate = [variant for module in compile_gate.kernel_modules() for variant in module.variants(90)]
    compared, forms = 0, set()
    for kernel, arguments, options in launches:
        signature, known, constants, given = compiled_for(kernel, arguments, options)
        odd = arguments.get("channels") == SIZES[-1]
        fitting = [
            each
            for each in gate
            if each.fn is kernel and each.signature == signature and compile_gate.attributes(each, odd) == known
        ]
        if odd:
            assert fitting, (kernel, signature, known)
            forms.add(kernel)
            continue
        target = {"num_warps": given["num_warps"], "num_stages": given.get("num_stages", 1)}
        target["enable_fp_fusion"] = given.get("enable_fp_fusion", True)
        shape_free = ("BLOCK_SPLITS", "BLOCK_GROUPS")  # of the second stage, which follow from the number of processors
        assert any(
            {name: value for name, value in each.constexprs.items() if name not in shape_free}
            == {name: value for name, value in constants.items() if name not in shape_free}
            and target["num_warps"] == each.num_warps
            and target["enable_fp_fusion"] == each.fp_fusion
            and given.get("launch_pdl", False) == each.dependent
            for each in fitting
        ), (kernel, signature, known, constants, given)
        compared += 1
    assert compared > 20 and len(forms) > 4


def test_a_gate_that_compiles_something_else_is_noticed():
    """Of an argument more that is a multiple of 16, and of the options that the update is launched with."""
    (update,) = [each for each in sgd_ema_variants(90) if each.name == "sgd_ema.update"]
    assert not update.fp_fusion and compile_gate.specialised(update) == ()
    apply = next(each for each in batch_norm_module.variants(90) if ".apply" in each.name)
    assert compile_gate.specialised(apply) == ("rows", "channels")
    plain, odd = (compile_gate.attributes(apply, odd) for odd in (False, True))
    assert len(plain) == len(odd) + 2 and odd.items() <= plain.items()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_no_preset_launches_a_form_of_odd_sizes(arch):
    """There batch norm's sums may spill: rows of a group and channels of every layer are multiples of 16."""
    kinds = {
        (recipe.stem, recipe.crop_size, recipe.width, recipe.bn_group or recipe.batch_size)
        for _, recipe in PRESETS.values()
    }
    for stem, pixels, width, group in kinds:
        recipe = dataclasses.replace(PRESETS["v2"][1], arch=arch, stem=stem, width=width)
        layers = convolutions(build_encoder(recipe), pixels)
        assert all(layer.channels % 16 == group * layer.side**2 % 16 == 0 for layer in layers)
    assert 4 * 7**2 % 16  # but groups of four images would, at 7 x 7 pixels
