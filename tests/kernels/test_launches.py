"""What holds for every launch of every kernel: it goes to the device of its tensors, and masked lanes hold numbers."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

from fastmoco.kernels import reference
from fastmoco.kernels.batch_norm import Norm, batch_norm_act
from fastmoco.kernels.batch_norm_pool import batch_norm_pool
from fastmoco.kernels.compile_gate import kernel_modules
from fastmoco.kernels.enqueue import enqueue
from fastmoco.kernels.info_nce import info_nce
from fastmoco.kernels.nt_xent import nt_xent
from fastmoco.kernels.photometric import photometric
from fastmoco.kernels.sgd_ema import TensorTable, ema, sgd_ema

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="looks on as the interpreter loads")


def launch_info_nce(device: torch.device) -> None:
    z, k, queue = (F.normalize(torch.randn(rows, 16, device=device)) for rows in (3, 3, 70))
    info_nce(z.requires_grad_(), k, queue, 0.07, impl="triton")[0].sum().backward()


def launch_nt_xent(device: torch.device) -> None:
    z_a, z_b = (torch.randn(5, 16, device=device, requires_grad=True) for _ in range(2))
    nt_xent(z_a, z_b, 0.1, impl="triton")[0].backward()


def launch_enqueue(device: torch.device) -> None:
    queue, pointer = torch.zeros(30, 8, device=device), torch.tensor([25], device=device)
    enqueue(queue, pointer, torch.randn(10, 8, device=device), impl="triton")


def launch_batch_norm(device: torch.device) -> None:
    x, side = (torch.randn(4, 5, device=device, requires_grad=True) for _ in range(2))
    norm = Norm(torch.ones(5, device=device), torch.zeros(5, device=device))
    batch_norm_act(x, *norm, 2, residual=side, residual_norm=norm, impl="triton").sum().backward()


def launch_batch_norm_pool(device: torch.device) -> None:
    x = torch.randn(4, 5, 5, 4, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = Norm(torch.ones(5, device=device), torch.zeros(5, device=device))
    sum(y.sum() for y in batch_norm_pool(x, *norm, 2, impl="triton")).backward()


def launch_sgd_ema(device: torch.device) -> None:
    q, velocity, k = ([torch.randn(9, device=device)] for _ in range(3))
    table = TensorTable(q, velocity, k, [q[0].bfloat16()], [k[0].half()])
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sgd_ema(table, [torch.randn(9, device=device).to(dtype)], 0.1, 0.9, 1e-4, 0.99, flag, impl="triton")
    ema(table, 0.99, impl="triton")


def launch_photometric(device: torch.device) -> None:
    crops, parameters = torch.zeros(2, 5, 5, 3, dtype=torch.uint8, device=device), torch.ones(2, 8, device=device)
    parameters[:, reference.ORDER], parameters[0, reference.SIGMA] = 0b11100100, 0.0
    photometric(crops, parameters, (0.5,) * 3, (0.5,) * 3, impl="triton")


LAUNCHERS = (
    launch_info_nce,
    launch_nt_xent,
    launch_enqueue,
    launch_batch_norm,
    launch_batch_norm_pool,
    launch_sgd_ema,
    launch_photometric,
)


class Watch:
    """Stands for torch.cuda.device_of and for launching: which kernels were launched, and whether the device of their
    tensors had been entered, on whichever the test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered: list[Tensor] = []
        self.launches: list[tuple[object, bool]] = []
        launching = KernelInterface.__getitem__

        def watched(kernel: KernelInterface, grid: object) -> Callable[..., None]:
            def launch(*arguments: object, **options: object) -> None:
                tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
                inside = bool(self.entered) and {t.device for t in tensors} == {self.entered[-1].device}
                self.launches.append((kernel, inside))
                launching(kernel, grid)(*arguments, **options)

            return launch

        monkeypatch.setattr(KernelInterface, "__getitem__", watched)
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: Entered(self.entered, tensor))


class Entered:
    """A device entered for a tensor."""

    def __init__(self, entered: list[Tensor], tensor: Tensor) -> None:
        self.entered, self.tensor = entered, tensor

    def __enter__(self) -> None:
        self.entered.append(self.tensor)

    def __exit__(self, *error: object) -> None:
        assert self.entered.pop() is self.tensor


def test_every_kernel_is_launched_on_the_device_of_its_tensors(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    for launcher in LAUNCHERS:
        launcher(device)
    shipped = {variant.fn.__name__ for module in kernel_modules() for variant in module.variants(90)}
    assert {kernel.__name__ for kernel, _ in watch.launches} == shipped
    assert [kernel.__name__ for kernel, inside in watch.launches if not inside] == []


def test_a_launch_on_whatever_device_is_current_is_noticed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: Entered([], tensor))
    launch_enqueue(device)
    assert [inside for _, inside in watch.launches] == [False]


@interpreted
def test_masked_lanes_hold_what_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton leaves masked lanes of a load undefined where nothing is given for them; the interpreter zeroes them."""
    undefined = watch_loads(monkeypatch)
    for launcher in LAUNCHERS:
        launcher(torch.device("cpu"))
        assert not undefined, launcher.__name__


@triton.jit
def copy_three(x, y):
    lanes = triton.language.arange(0, 4)
    triton.language.store(y + lanes, triton.language.load(x + lanes, mask=lanes < 3), mask=lanes < 3)


@interpreted
def test_an_undefined_lane_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    undefined = watch_loads(monkeypatch)
    copy_three[(1,)](torch.ones(4), torch.zeros(4))
    assert undefined


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The masks of loads that leave lanes undefined, as they come."""
    lanes, load = [], interpreter.InterpreterBuilder.create_masked_load

    def watched(builder: object, pointers: object, mask: object, other: object, *rest: object) -> object:
        if other is None and not mask.data.all():
            lanes.append(mask.data)
        return load(builder, pointers, mask, other, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
    return lanes


def falling_loops(source: str) -> list[str]:
    """Loops of Triton functions whose step is the negative of something that only the launch knows.

    The interpreter runs them; compiled, a loop compares its counter as if it went up, and such a one never runs.
    """
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    jitted = [f for f in functions if any("jit" in ast.unparse(decorator) for decorator in f.decorator_list)]
    calls = [node.iter for f in jitted for node in ast.walk(f) if isinstance(node, ast.For)]
    steps = [call.args[2] for call in calls if isinstance(call, ast.Call) and len(call.args) == 3]
    falling = [step for step in steps if any(isinstance(node, (ast.USub, ast.Sub)) for node in ast.walk(step))]
    return [ast.unparse(step) for step in falling if not isinstance(getattr(step, "operand", None), ast.Constant)]


def test_no_loop_falls_by_a_step_that_the_compiler_does_not_know() -> None:
    folder = Path(reference.__file__).parent
    assert {path.name: actual for path in folder.glob("*.py") if (actual := falling_loops(path.read_text()))} == {}
    control = "@triton.jit\ndef kernel(n, B):\n    for i in range(n, -1, -n * B):\n        pass\n"
    assert falling_loops(control) == ["-n * B"]
    assert falling_loops(control.replace("-n * B", "-1")) == falling_loops(control.replace("-n * B", "B")) == []
