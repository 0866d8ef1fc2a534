"""Every kernel against what others would use for the same work, in the same run.

A case holds providers that do the same work on the same tensors, and the least bytes and operations of that work from
the kernel's own `cost`. `CASES` has one entry per kernel file; a test fails where one is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.bench import losses
from fastmoco.bench.journal import Journal
from fastmoco.bench.record_files import BY_HOST, Row, matches
from fastmoco.bench.roofline import convolutions
from fastmoco.bench.step import tf32
from fastmoco.bench.timing import Machine, interleave, measure_machine
from fastmoco.contrast.graph import CaptureError, captured
from fastmoco.data.plan import Plan
from fastmoco.encoder import build_encoder
from fastmoco.kernels import (
    TensorTable,
    batch_norm,
    batch_norm_pool,
    convolution,
    ema,
    enqueue,
    info_nce,
    photometric,
    sgd_ema,
)
from fastmoco.kernels.batch_norm_plan import one_after_the_other
from fastmoco.kernels.enqueue import cost as enqueue_cost
from fastmoco.kernels.info_nce import cost as info_nce_cost
from fastmoco.kernels.nt_xent import Form
from fastmoco.kernels.nt_xent import cost as nt_xent_cost
from fastmoco.kernels.photometric import cost as photometric_cost
from fastmoco.kernels.sgd_ema import cost as sgd_ema_cost
from fastmoco.kernels.sgd_ema import ema_cost
from fastmoco.recipe import Recipe

OURS = "fastmoco"
CAPTURE_WARMUP = 3


class Size(NamedTuple):
    """Shapes that the kernels are timed at: those of one step of `recipe` on one rank."""

    recipe: Recipe
    dtype: torch.dtype

    @property
    def batch(self) -> int:
        """Pairs."""
        return self.recipe.batch_size


@dataclass(frozen=True)
class Case:
    """One comparison: `providers` do the same work, whose least cost is `nbytes` and `flops`.

    `launches` says that the work is many short kernels, which a host cannot launch as fast as a GPU runs them: there
    each provider is timed as a CUDA graph, as a training step runs it.
    """

    name: str
    config: dict
    providers: Mapping[str, Callable[[], object]]
    baseline: str
    nbytes: float
    flops: float = 0.0
    launches: bool = False


def run(
    recipe: Recipe,
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    dtype: torch.dtype,
    only: str = "",
    journal: Journal | None = None,
) -> list[Row]:
    """Time every case on `device`, at the shapes of `recipe`; `only` keeps the kernels whose name it stands in.

    The journal has the rows after every case. What fails is noted there and costs its own rows.
    """
    names = [name for name in CASES if matches(name, only)]
    if not names:
        raise ValueError(f"there is no kernel {only}: use one of {', '.join(CASES)}")
    journal = journal or Journal()
    # As the step sets it: cuDNN times its algorithms once, for the baselines, too.
    torch.backends.cudnn.benchmark = device.type == "cuda" or torch.backends.cudnn.benchmark
    size, machine = Size(recipe, dtype), measure_machine(device, dtype)
    with tf32(convolutions=False, products=False):  # in fp32 ours are exact to rounding, and so must be what they meet
        for name in names:
            with journal.attempt(name):
                for case in CASES[name](size, device):
                    journal.keep(rows(case, machine, device, rounds, warmup, journal))
    return journal.rows


def rows(
    case: Case,
    machine: Machine,
    device: torch.device,
    rounds: int,
    warmup: int = 3,
    journal: Journal | None = None,
) -> list[Row]:
    """One row per provider of `case`, in milliseconds, with bytes moved per second beside it.

    Without a journal a provider that fails ends it all.
    """
    calls: Mapping[str, Callable[[], object]] = case.providers
    how: dict[str, str] = {}
    if case.launches and device.type == "cuda":
        calls, how = _as_graphs(case.providers)
    on_failure = None if journal is None else lambda name, error: journal.fail(f"{case.name}, {name}", error)
    times = interleave(calls, rounds=rounds, warmup=warmup, device=device, cold=True, on_failure=on_failure)
    bound = 1e3 * machine.bound(case.nbytes, case.flops)
    return [
        Row(
            case.name,
            provider,
            "ms",
            tuple(1e3 * sample for sample in timing.samples),
            case.config,
            case.baseline,
            bound,
            {"GB/s": case.nbytes / timing.median / 1e9, **({"launched by": how[provider]} if how else {})},
        )
        for provider, timing in times.items()
    ]


def replay(call: Callable[[], object], stream: torch.cuda.Stream, pool: tuple[int, int]) -> Callable[[], object]:
    """`call` as a CUDA graph, captured on `stream` after a warm-up there; raises CaptureError if it cannot be."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return captured(call, stream, pool).replay


def _as_graphs(providers: Mapping[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
    calls, how = {}, {}
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    for name, call in providers.items():
        try:
            calls[name], how[name] = replay(call, stream, pool), "a CUDA graph"
        except (CaptureError, RuntimeError) as error:
            print(f"{name} is timed without a CUDA graph: {error}", file=sys.stderr)
            calls[name], how[name] = call, BY_HOST
    return calls, how


def info_nce_cases(size: Size, device: torch.device) -> list[Case]:
    """Loss, rank and gradient over the whole queue."""
    n, k, d, t = size.batch, size.recipe.check_queue(), size.recipe.dim, size.recipe.temperature
    z = torch.randn(n, d, device=device, dtype=size.dtype).requires_grad_()
    keys = F.normalize(torch.randn(n, d, device=device), dim=1).to(size.dtype)
    queue = F.normalize(torch.randn(k, d, device=device), dim=1).to(size.dtype)

    def ours() -> Tensor:
        loss, _ = info_nce(z, keys, queue, t)
        return torch.autograd.grad(loss.mean(), z)[0]

    providers: dict[str, Callable[[], object]] = {
        OURS: ours,
        "eager": functools.partial(losses.published_loss, z, keys, queue, t),
    }
    if device.type == "cuda":
        compiled = torch.compile(losses.published_forward)
        providers["torch.compile"] = functools.partial(losses.published_loss, z, keys, queue, t, compiled)
        providers["split attention"] = functools.partial(losses.split_attention, z, keys, queue, t)
    nbytes, flops = info_nce_cost(n, k, d, size.dtype, size.dtype)
    config = {"N": n, "K": k, "D": d, "dtype": short_name(size.dtype)}
    return [Case("info_nce", config, providers, "eager", nbytes, flops)]


def nt_xent_cases(size: Size, device: torch.device) -> list[Case]:
    """Loss, rank and gradient of NT-Xent over both views of a batch, and of its form that inf-cl has, by batch."""
    return [
        _nt_xent_case(n, form, size, device)
        for form in losses.TIMED_FORMS
        for n in sorted({size.batch, *losses.PAIRS[device.type]})
    ]


def _nt_xent_case(n: int, form: Form, size: Size, device: torch.device) -> Case:
    d, t = size.recipe.dim, size.recipe.temperature
    z = [torch.randn(n, d, device=device, dtype=size.dtype).requires_grad_() for _ in range(2)]
    nbytes, flops = nt_xent_cost(n, n, d, size.dtype, form)
    config = {"N": n, "D": d, "dtype": short_name(size.dtype), "form": form}
    return Case("nt_xent", config, losses.ways_to_nt_xent(z, t, form), "eager", nbytes, flops)


def enqueue_cases(size: Size, device: torch.device) -> list[Case]:
    """Write one batch of keys into the ring."""
    k, d = size.recipe.check_queue(), size.recipe.dim
    queue, keys = torch.zeros(k, d, device=device, dtype=size.dtype), torch.randn(size.batch, d, device=device)
    pointer = torch.zeros(1, dtype=torch.int64, device=device)
    published = torch.zeros(d, k, device=device)

    def slice_at_a_host_pointer() -> None:
        start = int(pointer) // size.batch * size.batch
        published[:, start : start + size.batch] = keys.T
        pointer[0] = (start + size.batch) % k

    providers = {OURS: lambda: enqueue(queue, pointer, keys), "published": slice_at_a_host_pointer}
    nbytes, flops = enqueue_cost(k, d, size.batch, size.dtype, keys.dtype)
    return [Case("enqueue", {"B": size.batch, "K": k, "D": d}, providers, "published", nbytes, flops)]


def sgd_ema_cases(size: Size, device: torch.device) -> list[Case]:
    """SGD, EMA and casts over an encoder's tensors, and EMA alone."""
    shapes = [p.shape for p in build_encoder(size.recipe).parameters()]
    masters = [[torch.randn(s, device=device) * 0.01 for s in shapes] for _ in range(3)]
    q, velocity, k = masters
    work = [[p.to(size.dtype, copy=True) for p in tensors] for tensors in (q, k)]
    grads = [torch.randn_like(p) * 1e-3 for p in work[0]]
    table = TensorTable(q, velocity, k, *work)
    lr, flag = torch.tensor(1e-4, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    kind = "fused" if device.type == "cuda" else "foreach"
    optimizer = torch.optim.SGD(q, 1e-4, momentum=0.9, weight_decay=1e-4, **{kind: True})
    wide = [torch.empty_like(p) for p in q]
    for p, g in zip(q, wide, strict=True):
        p.grad = g

    def separate() -> None:
        torch._foreach_copy_(wide, grads)
        optimizer.step()
        torch._foreach_lerp_(k, q, 0.001)
        torch._foreach_copy_(work[0], q)
        torch._foreach_copy_(work[1], k)

    # Tensors of its own: the published loop moves each key to new memory, from under every table.
    published = [key.clone() for key in k]

    def loop() -> None:
        for key, query in zip(published, q, strict=True):
            key.data = key.data * 0.999 + query.data * 0.001

    step_bytes, step_flops = sgd_ema_cost(table, [g.dtype for g in grads])
    ema_bytes, ema_flops = ema_cost(table)
    plain = TensorTable(q, velocity, k, q, k)
    config = {"tensors": len(q), "parameters": sum(p.numel() for p in q), "dtype": short_name(size.dtype)}
    ours = lambda: sgd_ema(table, grads, lr, 0.9, 1e-4, 0.999, flag)  # noqa: E731
    averages = {
        OURS: lambda: ema(plain, 0.999),
        "foreach lerp": lambda: torch._foreach_lerp_(k, q, 0.001),
        "published": loop,
    }
    return [
        Case("sgd_ema", config, {OURS: ours, "torch separate": separate}, "torch separate", step_bytes, step_flops),
        Case("ema", {**config, "dtype": "fp32"}, averages, "foreach lerp", ema_bytes, ema_flops),
    ]


def batch_norm_cases(size: Size, device: torch.device) -> list[Case]:
    """Batch norm + ReLU (+ residual), forward and backward, over all the shapes of an encoder."""
    convs = [c for c in convolutions(build_encoder(size.recipe), size.recipe.crop_size) if c.place != "shortcut"]
    shapes = Counter((conv.channels, conv.side, conv.place == "last") for conv in convs)
    layers = [_NormLayer(size, device, *key, repeats=count) for key, count in shapes.items()]
    groups = size.batch // size.recipe.bn_group
    providers = {OURS: lambda: _each(layers, "ours", groups), "native": lambda: _each(layers, "native")}
    if device.type == "cuda":
        providers["native fp16"] = lambda: _each(layers, "native_fp16")
        providers["fastmoco, no launch overlaps"] = lambda: _apart(layers, groups)
    costs = [layer.cost(groups) for layer in layers]
    config = {"encoder": size.recipe.arch, "N": size.batch, "layers": sum(shapes.values())}
    config["dtype"] = short_name(size.dtype)
    nbytes, flops = (sum(column) for column in zip(*costs, strict=True))
    return [Case("batch_norm", config, providers, "native", nbytes, flops, launches=True)]


def _apart(layers: list[_NormLayer], groups: int) -> None:
    with one_after_the_other():
        _each(layers, "ours", groups)


def batch_norm_pool_cases(size: Size, device: torch.device) -> list[Case]:
    """The end of the stem, forward and backward with the gradients of two readers, at the shape of ImageNet's stem."""
    recipe = dataclasses.replace(size.recipe, stem="imagenet")
    stem = convolutions(build_encoder(recipe), recipe.crop_size)[0]
    shape, groups = (size.batch, stem.channels, stem.side, stem.side), size.batch // recipe.bn_group
    x = torch.randn(shape, device=device, dtype=size.dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.ones(stem.channels, device=device, requires_grad=True) for _ in range(2))
    running = (torch.zeros(stem.channels, device=device), torch.ones(stem.channels, device=device))
    with torch.no_grad():
        dy = [torch.randn_like(F.max_pool2d(x, 3, 2, 1)) for _ in range(2)]

    def ours() -> None:
        pair = batch_norm_pool.batch_norm_pool(x, weight, bias, running, groups)
        torch.autograd.grad(pair, [x, weight, bias], dy)

    def native() -> None:
        y = F.max_pool2d(F.relu(F.batch_norm(x, *running, weight, bias, True)), 3, 2, 1)
        torch.autograd.grad([y.view_as(y), y.view_as(y)], [x, weight, bias], dy)

    costs = [batch_norm_pool.cost(shape, size.dtype.itemsize, groups, backward=b) for b in (False, True)]
    nbytes, flops = (sum(column) for column in zip(*costs, strict=True))
    config = {"N": size.batch, "C": stem.channels, "S": stem.side, "dtype": short_name(size.dtype)}
    providers = {OURS: ours, "native": native}
    return [Case("batch_norm_pool", config, providers, "native", nbytes, flops, launches=True)]


def convolution_cases(size: Size, device: torch.device) -> list[Case]:
    """All convolutions of an encoder, forward and backward; on a GPU ours are torch's own, and there is no case."""
    if device.type == "cuda":
        return []
    convs = convolutions(build_encoder(size.recipe), size.recipe.crop_size)
    shapes = Counter((conv.inputs, conv.weights, conv.channels, conv.kernel, conv.stride) for conv in convs)
    layers = [_ConvolutionLayer(size, *shape, repeats=count) for shape, count in shapes.items()]
    providers = {
        OURS: lambda: _each(layers, "run", "ours"),
        "channels-last": lambda: _each(layers, "run", "channels-last"),
        "contiguous": lambda: _each(layers, "run", "contiguous"),
    }
    nbytes, flops = (sum(column) for column in zip(*(layer.cost() for layer in layers), strict=True))
    config = {"encoder": size.recipe.arch, "N": size.batch, "px": size.recipe.crop_size, "layers": len(convs)}
    config["dtype"] = short_name(size.dtype)
    return [Case("convolution", config, providers, "channels-last", nbytes, flops)]


def photometric_cases(size: Size, device: torch.device) -> list[Case]:
    """All photometric operations of one batch of views."""
    n, s, augmentation = size.batch, size.recipe.crop_size, size.recipe.augmentation
    crops = torch.randint(0, 256, (n, s, s, 3), dtype=torch.uint8, device=device)
    plan = Plan(size.recipe, torch.full((n * 10, 2), 400, dtype=torch.int32).numpy())
    parameters = torch.from_numpy(plan.photometric(0, plan.samples(0)[:n], 0)).to(device)
    channels = 4 if device.type == "cuda" else 3  # as the step asks for
    call = functools.partial(
        photometric,
        crops,
        parameters,
        augmentation.mean,
        augmentation.std,
        dtype=size.dtype,
        channels=channels,
        max_sigma=augmentation.blur_sigma[1],
    )
    providers = {OURS: call, "twin": functools.partial(call, impl="reference")}
    # Of three channels: nobody has to write the fourth.
    nbytes, flops = photometric_cost(n, s, dtype=size.dtype, blurred=augmentation.blur_p)
    return [Case("photometric", {"N": n, "S": s, "dtype": short_name(size.dtype)}, providers, "twin", nbytes, flops)]


CASES: dict[str, Callable[[Size, torch.device], list[Case]]] = {
    "info_nce": info_nce_cases,
    "nt_xent": nt_xent_cases,
    "sgd_ema": sgd_ema_cases,
    "batch_norm": batch_norm_cases,
    "batch_norm_pool": batch_norm_pool_cases,
    "convolution": convolution_cases,
    "photometric": photometric_cases,
    "enqueue": enqueue_cases,
}


class _NormLayer:
    """One batch norm of an encoder, with the tensors to run it forward and backward."""

    def __init__(
        self, size: Size, device: torch.device, channels: int, side: int, residual: bool, *, repeats: int
    ) -> None:
        self.repeats, self.shape, self.dtype = repeats, (size.batch, channels, side, side), size.dtype

        def draw() -> Tensor:
            return torch.randn(self.shape, device=device, dtype=size.dtype).to(memory_format=torch.channels_last)

        self.x, self.dy = draw().requires_grad_(), [draw() for _ in range(1 + residual)]
        self.residual = draw().requires_grad_() if residual else None
        self.weight, self.bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
        self.running = (torch.zeros(channels, device=device), torch.ones(channels, device=device))

    def ours(self, groups: int) -> None:
        # What ends a block has two readers, the next block's convolution and its shortcut.
        call = batch_norm.batch_norm_act if self.residual is None else batch_norm.batch_norm_act_twice
        for _ in range(self.repeats):
            y = call(self.x, self.weight, self.bias, self.running, groups, residual=self.residual)
            self._backward(y, self.x, self.residual, self.dy)

    def native(self) -> None:
        self._torch(self.x, self.residual, self.dy)

    def native_fp16(self) -> None:
        x, residual, *dy = self._halves
        self._torch(x, residual, dy)

    @functools.cached_property
    def _halves(self) -> tuple:
        # Made by the first call, which is not timed: the conversion is no part of the work.
        def half(x: Tensor) -> Tensor:
            return x.detach().half().requires_grad_()

        residual = None if self.residual is None else half(self.residual)
        return half(self.x), residual, *(dy.half() for dy in self.dy)

    def _torch(self, x: Tensor, residual: Tensor | None, dy: list[Tensor]) -> None:
        for _ in range(self.repeats):
            y = F.batch_norm(x, *self.running, self.weight, self.bias, True)
            y = F.relu(y if residual is None else y + residual)
            self._backward([y.view_as(y) for _ in dy], x, residual, dy)

    def _backward(self, y: Tensor | Sequence[Tensor], x: Tensor, residual: Tensor | None, dy: list[Tensor]) -> None:
        inputs = [x, self.weight, self.bias] + ([] if residual is None else [residual])
        torch.autograd.grad(y, inputs, dy)

    def cost(self, groups: int) -> tuple[float, float]:
        count = functools.partial(batch_norm.cost, self.shape, self.dtype.itemsize, groups)
        twice = self.residual is not None
        residual: Literal["none", "plain"] = "plain" if twice else "none"
        forward, backward = (count(residual=residual, backward=b, twice=twice) for b in (False, True))
        return self.repeats * (forward[0] + backward[0]), self.repeats * (forward[1] + backward[1])


class _ConvolutionLayer:
    """One convolution of an encoder, with the tensors to run it forward and backward."""

    def __init__(
        self, size: Size, numbers: int, weights: int, outputs: int, kernel: int, stride: int, *, repeats: int
    ) -> None:
        inputs = weights // outputs // kernel**2
        side = size.recipe.crop_size if inputs == 3 else math.isqrt(numbers // inputs)
        self.repeats, self.dtype = repeats, size.dtype
        self.contiguous = [
            torch.randn(shape, dtype=size.dtype).requires_grad_()
            for shape in ((size.batch, inputs, side, side), (outputs, inputs, kernel, kernel))
        ]
        self.torchs = functools.partial(F.conv2d, stride=stride, padding=kernel // 2)
        self.ours = functools.partial(convolution.conv2d, stride=stride, padding=kernel // 2)
        with torch.no_grad():
            laid_out = [t.contiguous(memory_format=torch.channels_last) for t in self.contiguous]
            self.dy = torch.randn_like(self.torchs(*laid_out))
        self.channels_last = [t.requires_grad_() for t in laid_out]
        self.layer = convolution.layer_of(laid_out[0].shape, laid_out[1].shape, stride, kernel // 2)

    def run(self, way: Literal["ours", "channels-last", "contiguous"]) -> None:
        call = self.ours if way == "ours" else self.torchs
        tensors = self.contiguous if way == "contiguous" else self.channels_last
        for _ in range(self.repeats):
            y = call(*tensors)
            torch.autograd.grad(y, tensors, self.dy.contiguous() if way == "contiguous" else self.dy)

    def cost(self) -> tuple[float, float]:
        nbytes, flops = convolution.cost(self.layer, self.channels_last[0].numel(), self.dtype)
        return self.repeats * nbytes, self.repeats * flops


def _each(layers: Sequence[_NormLayer | _ConvolutionLayer], method: str, *arguments: object) -> None:
    for layer in layers:
        getattr(layer, method)(*arguments)


def short_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
