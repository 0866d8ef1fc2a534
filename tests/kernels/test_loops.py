"""Loops compiled for a CPU: threads, forks, rounding, the cache, and memory that they cannot read."""

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")
import numba

from fastmoco.kernels.batch_norm import Norm, batch_norm_act, batch_norm_act_twice
from fastmoco.kernels.batch_norm_pool import batch_norm_pool
from fastmoco.kernels.cpu import batch_norm as cpu_batch_norm
from fastmoco.kernels.cpu import loops, vectors
from fastmoco.kernels.photometric import photometric

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def views(**options: object) -> Tensor:
    """Views of a few crops, each with a jitter, grey, a blur or a flip."""
    crops = torch.randint(0, 256, (5, 9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parameters = torch.tensor([[i % 2, i % 3, 27 * i - 1, 0.7, 1.2, 0.8, 0.1, i % 2] for i in range(5)])
    return photometric(crops, parameters, MEAN, STD, **options)


def norms(kind: str, dtype: torch.dtype = torch.float32, **options: object) -> list[Tensor]:
    """What batch norm gives in the form `kind`, or with pooling, forward and backward, in 8 groups cut in many pieces.

    32 samples of 24 channels and 35 x 37 pixels: a group has 124,320 numbers, 7 pieces, whose last is shorter.
    """
    generator = torch.Generator().manual_seed(0)

    def activation(height: int = 35, width: int = 37) -> Tensor:
        x = torch.randn(32, 24, height, width, generator=generator).to(dtype)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def norm() -> Norm:
        weight, bias = (torch.rand(24, generator=generator).requires_grad_() for _ in range(2))
        return Norm(weight, bias, (torch.zeros(24), torch.ones(24)))

    x, main, residual, side = activation(), norm(), activation(), norm()
    if kind == "pool":
        y = batch_norm_pool(x, *main, 8, **options)
    else:
        given = {"residual": residual} if kind != "none" else {}
        given |= {"residual_norm": side} if kind == "dual" else {}
        y = batch_norm_act_twice(x, *main, 8, **given, **options)
    leaves = (
        [x, *main[:2]] + ([residual] if kind in ("plain", "dual") else []) + ([*side[:2]] if kind == "dual" else [])
    )
    grads = [activation(*y[0].shape[2:]).detach() for _ in range(2)]
    return [y[0].detach(), *torch.autograd.grad(y, leaves, grads), *main.running]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "photometric": lambda: [views(), views(dtype=torch.bfloat16)],
    **{
        f"{kind} {str(dtype).removeprefix('torch.')}": functools.partial(norms, kind, dtype)
        for kind in ("none", "plain", "dual", "pool")
        for dtype in (torch.float32, torch.bfloat16)
    },
}


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is again what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_threads_gives_the_same_bits(name: str, threads) -> None:
    torch.set_num_threads(1)
    alone = CASES[name]()
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert same(CASES[name](), alone), count


@pytest.mark.parametrize(
    ("groups", "count", "whole"),
    [(8, 1, True), (8, 2, True), (8, 3, False), (8, 8, True), (9, 2, True), (3, 2, False), (1, 2, False)],
)
def test_a_thread_owns_whole_groups_where_they_keep_all_busy(groups: int, count: int, whole: bool, threads) -> None:
    """So above 1, 2 and 8 threads own whole groups, and 3 take pieces of them; groups that no cache holds are cut."""
    torch.set_num_threads(count)
    assert cpu_batch_norm._by_groups(torch.empty(groups, 24, 35, 37), groups) == whole
    assert not cpu_batch_norm._by_groups(torch.empty(groups, 2**20 + 1, device="meta"), groups)


def test_bits_would_show_another_order_of_sums(monkeypatch) -> None:
    """Control: cut into other pieces, as a cut by the number of threads would be, sums round otherwise."""
    alone = CASES["none float32"]()
    monkeypatch.setattr(cpu_batch_norm, "MOST_PIECES", 3)
    cpu_batch_norm._split.cache_clear()
    other = CASES["none float32"]()
    cpu_batch_norm._split.cache_clear()
    assert not same(alone, other)


@pytest.mark.parametrize("name", ["photometric", "dual bfloat16", "pool float32"])
def test_a_forked_child_computes_after_its_parent_did(name: str, threads) -> None:
    torch.set_num_threads(2)
    expected = CASES[name]()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if same(CASES[name](), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def _computed(name: str, path: Path) -> None:
    torch.set_num_threads(2)
    torch.save(CASES[name](), path)


@pytest.mark.slow
def test_a_spawned_child_computes_the_same(tmp_path: Path) -> None:
    """What its parent compiled and used does not go with it."""
    for name in ("photometric", "dual bfloat16", "pool float32"):
        expected, path = CASES[name](), tmp_path / "results"
        child = multiprocessing.get_context("spawn").Process(target=_computed, args=(name, path))
        child.start()
        child.join(120)
        assert child.exitcode == 0 and same(torch.load(path), expected), name


_identity = vectors.square(lambda x: [x], 1, "written")


@loops.loop(loops.Words("x one sixteen count"))
def _narrowed(words):
    """Numbers rounded one by one, and 16 at a time."""
    a = numba.carray(words, 1)[0]
    x, one, sixteen = loops.floats(a.x), loops.halves(a.one), loops.halves(a.sixteen)
    for i in range(a.count):
        one[i] = loops.narrow_or_nan(x[i], one)
    for i in range(0, a.count, vectors.LANES):
        _identity(sixteen, a.x + 4 * i, 0, 0, a.sixteen + 2 * i, 0, 0, 0, 0, 1, 1, 0)


def test_rounding_to_bf16_is_torchs_and_keeps_nan() -> None:
    """All upper halves of an fp32 number, with lower ones that are rounded down, up and to even; NaN with any bits."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | lower).ravel()
    x, quiet = torch.from_numpy(bits.view(np.float32)), torch.from_numpy(bits & (1 << 22) != 0)
    one, sixteen = (torch.zeros(len(x), dtype=torch.bfloat16) for _ in range(2))
    _narrowed(1, x=x, one=one, sixteen=sixteen, count=len(x))
    for found in (one, sixteen):
        numbers = ~x.isnan()
        assert torch.equal(found[numbers].view(torch.int16), x[numbers].to(torch.bfloat16).view(torch.int16))
        assert found[x.isnan() & quiet].isnan().all() and found[::6][x[::6].isnan()].isnan().all()


def test_a_weight_that_is_nan_gives_nan() -> None:
    """With all bits set, which are 0 when they are rounded as those of a number."""
    weight = torch.full((16,), -1, dtype=torch.int32).view(torch.float32)
    x = torch.randn(4, 16, 4, 4).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert batch_norm_act(x, weight, torch.zeros(16), None).isnan().all()
    assert batch_norm_pool(x, weight, torch.zeros(16), None, 1)[0].isnan().all()


SCRIPT = """
import sys, torch
from fastmoco.kernels.cpu.photometric import LOOPS
from fastmoco.kernels.photometric import photometric
crops = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
photometric(crops, torch.tensor([[0, 0, -1, 0, 0, 0, 0, 0.0]]), (0, 0, 0), (1, 1, 1))
print(LOOPS[torch.float32]._compiled.cache_hits)
"""


def in_a_new_process(cache: str | Path) -> int:
    """Loops that a new process found compiled in the folder `cache`: one or none."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_a_second_process_compiles_nothing() -> None:
    views()
    assert in_a_new_process(os.environ["NUMBA_CACHE_DIR"]) == 1


@pytest.mark.slow
def test_without_a_place_to_write_each_process_compiles(tmp_path: Path) -> None:
    """A file stands where the folder would be, which stops the superuser too."""
    (tmp_path / "file").touch()
    assert in_a_new_process(tmp_path / "file" / "folder") == 0


@loops.loop(loops.Words("to"))
def _kept(words):
    """For the next test alone, which spoils it for whoever calls it at the same time."""
    loops.longs(numba.carray(words, 1)[0].to)[0] = 7


@pytest.mark.parametrize("spoiled", ["nbi", "nbc"])
@pytest.mark.parametrize("end", ["nothing", "half", "zeros"])
def test_a_file_of_the_cache_without_its_end_is_written_anew(spoiled: str, end: str) -> None:
    """An index or a loop, as a machine leaves it that stops before all is on the disk."""

    def found_compiled() -> int:
        loop, number = loops.Loop(_kept._function, _kept._words), torch.zeros(1, dtype=torch.int64)
        loop(1, to=number)
        assert number == 7
        return loop._compiled.cache_hits

    found_compiled()
    assert found_compiled() == 1
    files = list(Path(os.environ["NUMBA_CACHE_DIR"]).rglob(f"test_loops._kept-*.{spoiled}"))
    for path in files:
        whole = path.read_bytes()
        half = whole[: len(whole) // 2]
        path.write_bytes({"nothing": b"", "half": half, "zeros": half + bytes(len(whole) - len(half))}[end])
    assert files and found_compiled() == 0
    assert found_compiled() == 1


def activation() -> tuple[Tensor, Norm]:
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    return x, Norm(torch.ones(16), torch.zeros(16))


def test_the_default_device_is_not_asked() -> None:
    """Whoever borrows a loop may have torch make tensors elsewhere unless it is told where."""
    (x, norm), crops = activation(), torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    x, gradient, parameters = x.requires_grad_(), torch.ones_like(x), torch.rand(2, 8)

    def everything() -> list[Tensor]:
        y, again = batch_norm_act_twice(x, *norm, 2)
        pooled, _ = batch_norm_pool(x, *norm, 2)
        small = gradient[:, :, :3, :3].contiguous(memory_format=torch.channels_last)
        grads = torch.autograd.grad((y, again, pooled), x, (gradient, gradient, small))
        return [y.detach(), pooled.detach(), *grads, photometric(crops, parameters, MEAN, STD)]

    expected = everything()
    with torch.device("meta"):
        assert same(everything(), expected)


@pytest.mark.parametrize(
    ("odd", "words"), [(lambda t: t.to("meta"), "on meta"), (torch._neg_view, "or one that is a negated view")]
)
def test_memory_that_a_loop_cannot_read_is_refused(odd: Callable[[Tensor], Tensor], words: str) -> None:
    x, (weight, bias, _) = activation()
    with pytest.raises(ValueError, match=words):
        batch_norm_act_twice(x, odd(weight), bias, None)
    with pytest.raises(ValueError, match=words):
        cpu_batch_norm.statistics(odd(x), None, None, 2, 0.1, 1e-5)


def test_a_trace_records_the_operators() -> None:
    """While torch.jit traces, sizes are tensors, whose addresses a loop would take for numbers."""
    x, norm = activation()
    traced = torch.jit.trace(lambda x: batch_norm_act_twice(x, *norm, 2)[0], x, check_trace=False)
    assert torch.equal(traced(2 * x), batch_norm_act_twice(2 * x, *norm, 2)[0])
