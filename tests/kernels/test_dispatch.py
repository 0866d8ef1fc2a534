"""One rule for all kernels of who computes; and rounding in the interpreter as on a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from fastmoco.kernels import dispatch
from fastmoco.kernels.dispatch import cast, check_dtype, is_traced, takes_kernel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", KERNELS)
def test_auto_means_the_kernel_on_a_gpu_and_the_twin_elsewhere(dtype):
    assert takes_kernel("auto", GPU, dtype) and not takes_kernel("auto", CPU, dtype)
    assert not takes_kernel("reference", GPU, dtype) and takes_kernel("triton", GPU, dtype)


def test_float64_goes_to_the_twin_everywhere():
    assert not takes_kernel("auto", GPU, torch.float32, torch.float64)
    with pytest.raises(ValueError, match="not torch.float64: use impl='reference'"):
        takes_kernel("triton", GPU, torch.float64)


@pytest.mark.parametrize("impl", ["cuda", "", None])
def test_an_unknown_impl_is_refused_everywhere(impl):
    for device in (CPU, GPU):
        with pytest.raises(ValueError, match="impl must be auto, triton or reference"):
            takes_kernel(impl, device, torch.float32)


def test_without_a_gpu_or_the_interpreter_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", tl.constexpr(False))
    with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
        takes_kernel("triton", CPU, torch.float32)


def test_dtypes_that_nothing_takes_are_named():
    for dtype in (*KERNELS, torch.float64):
        check_dtype("keys", dtype)
    with pytest.raises(ValueError, match="keys must be fp32, bf16, fp16 .* not torch.int64"):
        check_dtype("keys", torch.int64)


def test_a_tracer_is_noticed():
    x = torch.zeros(2)
    assert not is_traced(x) and not is_traced(torch.nn.Parameter(x))
    with torch._subclasses.FakeTensorMode() as mode:
        assert is_traced(x)
        fake = mode.from_tensor(x)
    assert is_traced(fake)
    traced = []
    torch.compile(lambda x: (traced.append(is_traced(x)), x + 1)[1], backend="eager")(x)
    assert traced == [True]


@triton.jit
def round_kernel(x, y, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(y + lane, cast(tl.load(x + lane), y.dtype.element_ty))


@pytest.mark.parametrize("dtype", KERNELS)
def test_casts_round_as_torch_does(dtype, device):
    x = torch.randn(1024, device=device) * 2.0 ** torch.randint(-20, 15, (1024,), device=device)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11], device=device)  # of bf16 and of fp16
    x[:4], x[4:8] = ties, torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], device=device)
    y = torch.empty(1024, dtype=dtype, device=device)
    round_kernel[(1,)](x, y, BLOCK=1024)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
