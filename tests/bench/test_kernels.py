"""Every kernel file has a benchmark, its providers do the same work, and its bound is the kernel's own cost."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmoco.kernels
from fastmoco.bench import kernels, losses, record_files
from fastmoco.bench.journal import Journal
from fastmoco.bench.kernels import CASES, OURS, Size
from fastmoco.bench.record_files import Row
from fastmoco.bench.roofline import convolutions
from fastmoco.bench.timing import Machine
from fastmoco.encoder import build_encoder
from fastmoco.presets import PRESETS

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    PRESETS["v2"][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=96, dim=16
)


def without_entry(names: set[str]) -> set[str]:
    """Kernel files among `names` that have no benchmark: files with a launch hook, `variants`, hold kernels."""
    folder = Path(fastmoco.kernels.__file__).parent
    return {name for name in names if "\ndef variants(" in (folder / f"{name}.py").read_text()} - set(CASES)


def test_every_kernel_file_has_an_entry(monkeypatch):
    files = {path.stem for path in Path(fastmoco.kernels.__file__).parent.glob("*.py")} - {"inspect"}
    assert without_entry(files) == set()
    assert set(CASES) <= files
    monkeypatch.delitem(CASES, "enqueue")
    assert without_entry(files) == {"enqueue"}


@pytest.fixture(scope="module")
def cases():
    torch.manual_seed(0)
    size = Size(SMALL, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.PAIRS, "cpu", ())
        made = [case for make in CASES.values() for case in make(size, CPU)]
    return {f"{case.name} {case.config['form']}" if "form" in case.config else case.name: case for case in made}


def test_every_case_runs_ours_and_its_baseline(cases):
    for case in cases.values():
        assert {OURS, case.baseline} <= case.providers.keys() and case.nbytes > 0
        for call in case.providers.values():
            call()
            call()


def test_the_losses_have_one_gradient(cases):
    for loss in ("info_nce", "nt_xent all", "nt_xent across"):
        ours, eager = (cases[loss].providers[name]() for name in (OURS, "eager"))
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_nt_xent_is_timed_by_batch_and_form():
    made = kernels.nt_xent_cases(Size(SMALL, torch.float32), CPU)
    assert [(case.config["form"], case.config["N"]) for case in made] == [
        (form, n) for form in ("all", "across") for n in (32, 256, 1024)
    ]
    for whole, half in zip(made[:3], made[3:], strict=True):
        assert whole.flops == 2 * half.flops and whole.nbytes == half.nbytes


def test_inf_cl_is_asked_for_the_same_loss(monkeypatch):
    """By a stand-in with the package's signature and its definition; its kernels need a GPU."""

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        assert head_dim == q.shape[1] and labels is None
        return torch.nn.functional.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")

    monkeypatch.setitem(sys.modules, "inf_cl", SimpleNamespace(cal_flash_loss=cal_flash_loss))
    z = [torch.randn(6, 16) for _ in range(2)]
    torch.testing.assert_close(losses.inf_cl_loss(*z, 0.2), losses.plain_nt_xent(*z, 0.2, "across"))


def test_convolutions_are_those_of_the_encoder_and_a_gpu_has_none_of_ours(cases):
    case, size = cases["convolution"], Size(SMALL, torch.float32)
    convs = convolutions(build_encoder(SMALL), SMALL.crop_size)
    assert case.flops == pytest.approx(3 * SMALL.batch_size * sum(conv.flops for conv in convs))
    assert kernels.convolution_cases(size, torch.device("cuda")) == []


def test_split_attention_is_the_same_gradient_where_it_runs():
    z, k, queue = (torch.randn(rows, 64, dtype=torch.float32) for rows in (8, 8, 512))
    z.requires_grad_()
    k, queue = (torch.nn.functional.normalize(t, dim=1) for t in (k, queue))
    expected = losses.published_loss(z, k, queue, 0.2)
    heads = torch.nn.functional.normalize(z.detach(), dim=1).expand(1, 4, 8, 64)
    pieces = queue.view(1, 4, -1, 64)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(heads, pieces, pieces, scale=1 / 0.2)
    actual = losses.merged(z, k, 0.2, out[0], lse[0])
    torch.testing.assert_close(actual / 8, expected, rtol=1e-4, atol=1e-6)


def test_rows_carry_bound_share_and_speed(cases):
    machine = Machine("toy", 1e9, 1e9)
    rows = kernels.rows(cases["enqueue"], machine, CPU, rounds=2)
    assert [row.provider for row in rows] == [OURS, "published"]
    assert all(row.bound == pytest.approx(cases["enqueue"].nbytes / 1e6) and row.extra["GB/s"] > 0 for row in rows)


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="no kernel softmax: use one of info_nce"):
        kernels.run(SMALL, CPU, dtype=torch.float32, only="softmax")


def test_the_halves_of_the_fp16_baseline_are_made_once(cases):
    layer = kernels._NormLayer(Size(SMALL, torch.bfloat16), CPU, 8, 4, True, repeats=2)
    layer.native_fp16()
    addresses = [half.data_ptr() for half in layer._halves]
    with CountedCasts() as counter:
        layer.native_fp16()
    assert counter.casts == 0 and [half.data_ptr() for half in layer._halves] == addresses
    with CountedCasts() as control:
        layer.x.half()
    assert control.casts == 1


class CountedCasts(TorchDispatchMode):
    """How many tensors of bfloat16 were converted."""

    casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.casts += "_to_copy" in str(func) and args[0].dtype == torch.bfloat16
        return out


def test_many_short_kernels_are_timed_as_a_graph_and_a_row_that_is_not_says_so(cases, monkeypatch):
    def replayed(call, stream, pool):
        if call == "unruly":
            raise RuntimeError("operation not permitted when stream is capturing")
        return f"{call}, replayed"

    for name in ("Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(kernels, "replay", replayed)
    calls, how = kernels._as_graphs({OURS: "ours", "other": "unruly"})
    assert calls == {OURS: "ours, replayed", "other": "unruly"}
    assert how == {OURS: "a CUDA graph", "other": "the host"}
    assert {name for name, case in cases.items() if case.launches} == {"batch_norm", "batch_norm_pool"}
    row = Row("batch_norm", "other", "ms", (1.0,), extra={"launched by": how["other"]})
    assert "| other (launched by the host) |" in record_files.table(
        [record_files.record("kernels", [row], record_files.environment())]
    )


def test_a_case_that_fails_costs_its_own_rows(monkeypatch):
    def broken(size: Size, device: torch.device) -> list:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(CASES, "photometric", broken)
    journal = Journal()
    rows = kernels.run(SMALL, CPU, rounds=2, dtype=torch.float32, only="photometric, enqueue", journal=journal)
    assert {row.name for row in rows} == {"enqueue"}
    assert journal.failures == {"photometric": "OutOfMemoryError: no room"}


def test_the_photometric_bound_is_of_three_channels_whatever_is_written(cases, monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "photometric", lambda *_, channels, **__: calls.append(channels))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    (padded,) = kernels.photometric_cases(Size(SMALL, torch.float32), torch.device("cuda"))
    padded.providers[OURS]()
    assert calls == [4] and padded.nbytes == cases["photometric"].nbytes
