"""The examples run, and give what the packages give in whose place they stand: in float64, or by the error budget.

Packages that are not installed are passed over; the formulas written here always stand in for them.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
F64 = torch.float64


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES[0].parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def views(n: int = 24, dim: int = 64, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, dim, generator=generator, dtype=F64)
    other = z + torch.randn(n, dim, generator=generator, dtype=F64)
    return z.to(dtype).requires_grad_(), other.to(dtype).requires_grad_()


def loss_and_gradients(loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return (value.detach(), *torch.autograd.grad(value, inputs))


def assert_same(ours, theirs, atol: float = 1e-12) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, capsys: pytest.CaptureFixture) -> None:
    assert example(path.stem).main() is None
    assert capsys.readouterr().out


# InfoNCE in the original builder


def test_three_lines_are_the_published_loss() -> None:
    moco = example("moco_builder")
    z, k = views(40)
    strangers = torch.randn(k.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    k = F.normalize(k.detach() + 4 * strangers, dim=1)  # some are nearer to another key than to their own
    contrast = moco.Contrast(64, 96, 0.07).double()
    theirs = loss_and_gradients(
        lambda z: moco.published_loss(F.normalize(z, dim=1), k, contrast.queue.T.clone(), 0.07)[0], z
    )
    assert_same(loss_and_gradients(lambda z: contrast(z, k)[0], z), theirs)
    top1 = moco.published_loss(F.normalize(z, dim=1), k, contrast.queue.T, 0.07)[1]
    assert 0 < top1 < 1 and contrast(z, k)[1] == top1
    with pytest.raises(AssertionError):  # control: another temperature
        contrast.temperature = 0.08
        assert_same(loss_and_gradients(lambda z: contrast(z, k)[0], z), theirs)


def test_keys_replace_the_oldest_and_wrap_around() -> None:
    contrast = example("moco_builder").Contrast(16, 10)
    keys = torch.arange(48.0).view(3, 16)
    for number in range(4):
        contrast.enqueue(keys + number)
    assert torch.equal(contrast.queue[:2], keys[1:] + 3) and torch.equal(contrast.queue[9], keys[0] + 3)
    assert contrast.queue_ptr.item() == 2


# EMA of any student and teacher


def student() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def trained(model: nn.Module, follow, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        follow()


def budget(ours: nn.Module, theirs: nn.Module, exact: nn.Module) -> None:
    """|float64 - ours| is at most |float64 - theirs| and some roundings of one number."""
    states = (model.state_dict().values() for model in (ours, theirs, exact))
    for mine, other, truth in zip(*states, strict=True):
        error, allowed = ((value.double() - truth.double()).abs().max().item() for value in (mine, other))
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("buffers", ["average", "copy", "keep"])
def test_a_teacher_follows(buffers: str) -> None:
    model = student()
    teacher, loop, exact = example("ema").Teacher(model, buffers), copy.deepcopy(model), copy.deepcopy(model).double()

    def follow() -> None:
        teacher.follow(0.9)
        with torch.no_grad():
            for follower in (loop, exact):
                for mine, theirs in zip(follower.parameters(), model.parameters(), strict=True):
                    mine.mul_(0.9).add_(theirs.to(mine.dtype), alpha=0.1)
                for mine, theirs in zip(follower.buffers(), model.buffers(), strict=True):
                    if buffers == "average" and mine.is_floating_point():
                        mine.mul_(0.9).add_(theirs.to(mine.dtype), alpha=0.1)
                    elif buffers != "keep":
                        mine.copy_(theirs)

    trained(model, follow)
    budget(teacher.module, loop, exact)
    assert not any(weight.requires_grad for weight in teacher.parameters())
    with pytest.raises(AssertionError):  # control: one more step
        teacher.follow(0.9)
        budget(teacher.module, loop, exact)


def test_it_is_timms_average() -> None:
    timm = pytest.importorskip("timm")
    model = student()
    ours, theirs = example("ema").model_ema_v3()(model, decay=0.9), timm.utils.ModelEmaV3(model, decay=0.9)
    exact = copy.deepcopy(model).double()

    def follow() -> None:
        ours.update(model)
        theirs.update(model)
        for mine, other in zip(exact.state_dict().values(), model.state_dict().values(), strict=True):
            mine.lerp_(other.double(), 0.1) if mine.is_floating_point() else mine.copy_(other)

    trained(model, follow)
    assert ours.table is not None and isinstance(ours, timm.utils.ModelEmaV3)
    budget(ours.module, theirs.module, exact)


def test_it_is_lightlys_update_momentum() -> None:
    utils = pytest.importorskip("lightly.models.utils")
    model = student()
    teacher, theirs, exact = example("ema").Teacher(model), copy.deepcopy(model), copy.deepcopy(model).double()
    wide = copy.deepcopy(model).double()

    def follow() -> None:
        teacher.follow(0.99)
        utils.update_momentum(model, theirs, 0.99)
        wide.load_state_dict(model.state_dict())
        utils.update_momentum(wide, exact, 0.99)

    trained(model, follow)
    budget(teacher.module, theirs, exact)


# NT-Xent


def written_here(z0: Tensor, z1: Tensor, temperature: float = 0.1) -> Tensor:
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z0)))


def test_nt_xent_is_the_formula() -> None:
    theirs = loss_and_gradients(written_here, *views())
    assert_same(loss_and_gradients(example("nt_xent").NTXentLoss(0.1), *views()), theirs)
    with pytest.raises(AssertionError):  # control: half the gradient, what a gather without one would leave
        assert_same([theirs[0], *(value / 2 for value in theirs[1:])], theirs)


def test_nt_xent_is_lightlys() -> None:
    loss = pytest.importorskip("lightly.loss")
    theirs = loss_and_gradients(loss.NTXentLoss(temperature=0.1), *views())
    assert_same(loss_and_gradients(example("nt_xent").NTXentLoss(0.1), *views()), theirs)


def test_nt_xent_is_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = loss_and_gradients(losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.1)), *views())
    # It adds the smallest normal float64 inside its logarithm, which moves nothing here.
    assert_same(loss_and_gradients(example("nt_xent").NTXentLoss(0.1), *views()), theirs)


def _on_a_rank(parallel, path: str) -> list[Tensor]:
    module = example("nt_xent")
    mine = slice(parallel.rank * 12, (parallel.rank + 1) * 12)
    pair = [view[mine].detach().requires_grad_() for view in views()]
    found = list(loss_and_gradients(module.NTXentLoss(0.1, gather_distributed=True), *pair))
    if importlib.util.find_spec("lightly"):
        from lightly.loss import NTXentLoss

        found += loss_and_gradients(NTXentLoss(0.1, gather_distributed=True), *pair)
    assert dist.is_initialized()
    return found


def test_two_ranks_find_the_loss_and_gradient_of_one(run_ranks) -> None:
    """Each rank's mean is of its own rows, so the mean over ranks is the whole, and its gradients are twice as long."""
    whole, *gradients = loss_and_gradients(written_here, *views())
    found = run_ranks(2, _on_a_rank, "")
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, whole, rtol=0, atol=1e-12)
    for number, gradient in enumerate(gradients, 1):
        joined = torch.cat([found[0][number], found[1][number]]) / 2
        torch.testing.assert_close(joined, gradient, rtol=0, atol=1e-12)
    for values in found:
        if len(values) > 3:  # lightly is there
            assert_same(values[:3], values[3:])


# Batch norm in a ResNet of torchvision's layout


def fused_beside(model: nn.Module, size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs in training and evaluation, gradients and state of the model, and of the fused one."""
    results = []
    for made in (copy.deepcopy(model), example("resnet").fuse(copy.deepcopy(model))):
        made.to(dtype).to(memory_format=torch.channels_last)
        x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        y = made(x.to(memory_format=torch.channels_last))
        y.square().mean().backward()
        gradients = [weight.grad for weight in made.parameters()]
        made.eval()
        with torch.no_grad():
            evaluated = made(x.to(memory_format=torch.channels_last))
        results.append([y.detach(), evaluated, *gradients, *made.state_dict().values()])
    return results[0], results[1]


def test_fused_blocks_are_plain_ones() -> None:
    block = example("resnet").Block
    torch.manual_seed(0)
    plain, fused = fused_beside(nn.Sequential(nn.Conv2d(3, 8, 3), block(8, 16), block(16, 16)), 12, F64)
    assert_same(fused, plain, 1e-11)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fused_networks_are_torchvisions(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    plain, fused = fused_beside(getattr(models, name)(num_classes=5), 64, F64)
    assert_same(fused, plain, 1e-9)


def test_groups_are_as_so_many_gpus() -> None:
    resnet = example("resnet")
    torch.manual_seed(0)
    plain = nn.Sequential(resnet.Block(8, 8)).double().to(memory_format=torch.channels_last)
    fused = resnet.fuse(copy.deepcopy(plain), groups=2)
    x = torch.randn(8, 8, 6, 6, dtype=F64).to(memory_format=torch.channels_last)
    expected = torch.cat([copy.deepcopy(plain)(half) for half in x.chunk(2)])
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-12)
    assert (fused(x) - copy.deepcopy(plain)(x)).abs().max() > 1e-3  # control: the whole batch's statistics


def test_what_cannot_be_fused_is_said() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        example("resnet").fuse(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.slow
def test_torchrun_finds_what_one_process_finds(tmp_path: Path) -> None:
    script = str(EXAMPLES[0].parent / "nt_xent.py")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES[0].parents[1]), "OMP_NUM_THREADS": "1"}
    said = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launcher]
        done = subprocess.run(
            [*command, script], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment, check=True
        )
        said.append(done.stdout.strip().partition(": ")[2])
    assert said[0] == said[1] and "loss 0." in said[0]
