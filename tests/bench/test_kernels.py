"""Every kernel file has a benchmark, its providers do the same work, and its bound is the kernel's own cost."""

import dataclasses
from pathlib import Path

import pytest
import torch

import fastmoco.kernels
from fastmoco.bench import kernels
from fastmoco.bench.kernels import OURS, PROVIDED, Size
from fastmoco.bench.timing import Machine
from fastmoco.recipe import PRESETS

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    PRESETS["v2"][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=96, dim=16
)


def without_entry(names: set[str]) -> set[str]:
    """Kernel files among `names` that have no benchmark: files with a launch hook, `variants`, hold kernels."""
    folder = Path(fastmoco.kernels.__file__).parent
    return {name for name in names if "\ndef variants(" in (folder / f"{name}.py").read_text()} - set(PROVIDED)


def test_every_kernel_file_has_an_entry(monkeypatch):
    files = {path.stem for path in Path(fastmoco.kernels.__file__).parent.glob("*.py")} - {"inspect"}
    assert without_entry(files) == set()
    assert set(PROVIDED) <= files
    monkeypatch.delitem(PROVIDED, "enqueue")
    assert without_entry(files) == {"enqueue"}


@pytest.fixture(scope="module")
def cases():
    torch.manual_seed(0)
    size = Size(SMALL, torch.float32)
    return {case.name: case for make in PROVIDED.values() for case in make(size, CPU)}


def test_every_case_runs_ours_and_its_baseline(cases):
    for case in cases.values():
        assert {OURS, case.baseline} <= case.providers.keys() and case.nbytes > 0
        for call in case.providers.values():
            call()
            call()


def test_the_losses_have_one_gradient(cases):
    ours, eager = (cases["info_nce"].providers[name]() for name in (OURS, "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_split_attention_is_the_same_gradient_where_it_runs():
    z, k, queue = (torch.randn(rows, 64, dtype=torch.float32) for rows in (8, 8, 512))
    z.requires_grad_()
    k, queue = (torch.nn.functional.normalize(t, dim=1) for t in (k, queue))
    expected = kernels.published_loss(z, k, queue, 0.2)
    heads = torch.nn.functional.normalize(z.detach(), dim=1).expand(1, 4, 8, 64)
    pieces = queue.view(1, 4, -1, 64)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(heads, pieces, pieces, scale=1 / 0.2)
    found = kernels.merged(z, k, 0.2, out[0], lse[0])
    torch.testing.assert_close(found / 8, expected, rtol=1e-4, atol=1e-6)


def test_rows_carry_bound_share_and_speed(cases):
    machine = Machine("toy", 1e9, 1e9)
    rows = kernels.rows(cases["enqueue"], machine, CPU, rounds=2)
    assert [row.provider for row in rows] == [OURS, "published"]
    assert all(row.bound == pytest.approx(cases["enqueue"].nbytes / 1e6) and row.extra["GB/s"] > 0 for row in rows)


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="no kernel softmax: use one of info_nce"):
        kernels.run(SMALL, CPU, dtype=torch.float32, only="softmax")
