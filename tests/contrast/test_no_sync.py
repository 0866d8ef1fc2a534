"""A step reads nothing back to the host and brings nothing from there: shown on tensors without values.

Whatever wants a value raises. With the kernels' operators, down to their launches, the tensors are on a device that
exists in name alone, where an operation over tensors of two devices raises as well; with the twins on the CPU.
"""

import copy
import functools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmoco.contrast.dictionary as dictionary_module
import fastmoco.contrast.views as views_module
from fastmoco.contrast.step import Step
from fastmoco.data.batch import Batch
from fastmoco.data.noise import noise_batch
from fastmoco.encoder import BatchNormAct
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

LR = 0.03
DEVICES = {"reference": "cpu", "triton": "nowhere:0"}


def tiny(**fields: object) -> Recipe:
    shape = dict(arch="resnet18", width=0.125, stem="cifar", crop_size=12, dim=16, queue_size=40)
    return Recipe(**shape | dict(batch_size=16, bn_group=4, temperature=0.2) | fields)


class WithoutData(TorchFunctionMode):
    """Deep copies of tensors made inside become fake ones, which have shapes and no values."""

    def __init__(self, mode: FakeTensorMode, device: str) -> None:
        super().__init__()
        self.mode, self.device = mode, device

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.like(tensor)
        return memo[id(tensor)]

    def like(self, tensor: Tensor) -> Tensor:
        fake = self.mode.from_tensor(tensor.detach())
        with self.mode:
            return torch.empty_like(fake, device=self.device)


class Crossing(RuntimeError):
    pass


class NothingCrosses(TorchDispatchMode):
    """Raises where an operation has tensors of the host and of the device; FakeTensorMode lets copies and [] pass."""

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if len({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
            raise Crossing(str(function))
        return result


def loss_without_data(step: Step, batch: Batch, device: str) -> Tensor:
    mode = FakeTensorMode()
    without = WithoutData(mode, device)
    parameters = [*step.encoder_q.parameters(), *step.encoder_k.parameters()]
    memo = {id(p): nn.Parameter(without.like(p), p.requires_grad) for p in parameters}
    with without:
        step, batch = copy.deepcopy((step, batch), memo)
    with mode, NothingCrosses():
        step.step(batch, LR)
        return step.step(batch, LR).loss


def as_it_is(keys: Tensor) -> Tensor:
    return keys


def read_back(keys: Tensor) -> Tensor:
    return keys * keys[0, 0].item()


def copied_in(keys: Tensor) -> Tensor:
    return keys * torch.ones(16).to(keys.device)


def scalar_of_the_host(keys: Tensor) -> Tensor:
    return keys * torch.tensor(2.0)


class Case(NamedTuple):
    """A step to try: the recipe's `fields`, the options of `Step`, and what is done to the keys in its middle."""

    precision: str = "fp32"
    fields: dict[str, object] = {}
    options: dict[str, object] = {}
    change: Callable[[Tensor], Tensor] = as_it_is


HONEST = {
    "fp32": Case(),
    "bf16 four channels": Case("bf16", options={"channels": 4}),
    "fp16 symmetric": Case("fp16", {"symmetric": True}),
    "fp16 lars": Case("fp16", {"optimizer": "lars"}),
    "bf16 eager": Case("bf16", options={"encoder": "eager"}),
}
CHANGED = {change.__name__: Case(change=change) for change in (read_back, copied_in, scalar_of_the_host)}


def outcome(impl: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the loss, or what was raised."""
    for module, name in ((dictionary_module, "info_nce"), (views_module, "photometric")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), impl=impl))
    monkeypatch.setattr(BatchNormAct, "impl", impl)
    honest = dictionary_module.positives
    monkeypatch.setattr(dictionary_module, "positives", lambda keys, *rest: honest(case.change(keys), *rest))
    recipe, parallel = tiny(**case.fields), Parallel()
    step, batch = Step(recipe, parallel, case.precision, **case.options), noise_batch(recipe, parallel)
    try:
        loss = loss_without_data(step, batch, DEVICES[impl])
    except (DataDependentOutputException, Crossing) as error:
        return f"{type(error).__name__}: {error}"
    return str(loss.device) if isinstance(loss, FakeTensor) else "it has data"


def outcomes() -> dict[str, dict[str, str]]:
    backend_registration._setup_privateuseone_for_python_backend("nowhere")
    # As cuDNN does: channels-last out for channels-last in.
    torch._C._conv_determine_backend_memory_format = lambda *_: torch.channels_last
    table = {impl: {} for impl in DEVICES}
    for impl in DEVICES:
        for name, case in (HONEST | CHANGED).items():
            with pytest.MonkeyPatch.context() as monkeypatch:
                table[impl][name] = outcome(impl, case, monkeypatch)
    return table


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, str]]:
    # In a process of its own: a device cannot be added to torch where a gradient was computed before, nor taken away.
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # or kernels would want a GPU, where there is one
    # Half a minute of processor time; on a busy machine that may be many minutes of the clock.
    result = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
        preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_CPU, (300, 300)),
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", HONEST)
@pytest.mark.parametrize("impl", DEVICES)
def test_a_step_neither_reads_back_nor_copies_in(impl: str, case: str, report: dict[str, dict[str, str]]) -> None:
    assert report[impl][case] == DEVICES[impl]


def test_either_would_be_noticed(report: dict[str, dict[str, str]]) -> None:
    for impl in DEVICES:
        assert report[impl]["read_back"].startswith("DataDependentOutputException: aten._local_scalar_dense")
    assert report["triton"]["copied_in"] == "Crossing: aten._to_copy.default"
    assert report["triton"]["scalar_of_the_host"] == "Crossing: aten.mul.Tensor"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing_on_a_gpu(precision: str, optimizer: str, make_batch: Callable) -> None:
    step = Step(tiny(optimizer=optimizer), Parallel(device=torch.device("cuda", 0)), precision)
    batch = make_batch(tiny(), 0)
    for name, value in vars(batch).items():
        setattr(batch, name, value.cuda() if isinstance(value, Tensor) else value)
    step.step(batch, LR)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            metrics = step.step(batch, LR)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.loss.isfinite()


if __name__ == "__main__":
    json.dump(outcomes(), sys.stdout)
