"""BatchNormAct: grouped statistics equal separate batch norms, whatever the memory layout."""

import pytest
import torch
from torch import nn

from fastmoco.encoder import BatchNormAct


def module(channels: int, group_size: int, relu: bool = True) -> BatchNormAct:
    norm = BatchNormAct(channels, group_size=group_size, relu=relu)
    norm.reset()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm.double()


def plain(norm: BatchNormAct) -> nn.BatchNorm2d:
    twin = nn.BatchNorm2d(norm.weight.numel()).double()
    twin.load_state_dict(norm.state_dict())
    return twin


def activations(samples: int = 12, channels: int = 5) -> torch.Tensor:
    return torch.randn(samples, channels, 6, 7, dtype=torch.float64).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("group", [2, 3, 4, 12])
def test_each_group_is_a_batch_norm_of_its_own(group: int) -> None:
    norm, x = module(5, group, relu=False), activations()
    twins = [plain(norm) for _ in range(12 // group)]
    expected = torch.cat([twin(part) for twin, part in zip(twins, x.split(group), strict=True)])
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(twin, name) for twin in twins]).mean(0)
        torch.testing.assert_close(getattr(norm, name), mean, rtol=1e-12, atol=1e-12)


def test_split_batch_norm_of_the_cifar_notebook() -> None:
    """There group n mod S holds sample n, by a view of NCHW memory; consecutive groups are the same up to order."""
    splits, x = 4, activations().contiguous()
    norm = module(5, 12 // splits, relu=False)
    folded = x.view(-1, 5 * splits, 6, 7)
    expected = nn.functional.batch_norm(
        folded, None, None, norm.weight.repeat(splits), norm.bias.repeat(splits), training=True
    ).view_as(x)
    order = torch.arange(12).view(-1, splits).T.flatten()
    ours = torch.empty_like(x)
    ours[order] = norm(x[order].to(memory_format=torch.channels_last)).contiguous()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    unordered = norm(x.to(memory_format=torch.channels_last))
    assert (unordered - expected).abs().max() > 1e-2


def test_one_group_is_nn_batch_norm() -> None:
    norm, x = module(5, 0, relu=False), activations()
    twin = plain(norm)
    torch.testing.assert_close(norm(x), twin(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, twin.running_var, rtol=1e-12, atol=1e-12)


def test_the_shortcuts_norm_joins_in_one_call() -> None:
    norm, side, x, shortcut = module(5, 4), module(5, 4, relu=False), activations(), activations()
    apart = module(5, 4, relu=False)
    apart.load_state_dict(norm.state_dict())
    side_apart = module(5, 4, relu=False)
    side_apart.load_state_dict(side.state_dict())
    expected = (apart(x) + side_apart(shortcut)).relu()
    torch.testing.assert_close(norm(x, shortcut, side), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(side.running_mean, side_apart.running_mean, rtol=1e-12, atol=1e-12)


def test_evaluation_uses_the_running_statistics() -> None:
    norm = module(5, 4, relu=False)
    norm(activations())
    twin = plain(norm).eval()
    norm.eval()
    x = activations(samples=7)  # no multiple of the group: evaluation has none
    torch.testing.assert_close(norm(x), twin(x), rtol=1e-12, atol=1e-12)


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="10 samples do not split over batch-norm groups of 4"):
        module(5, 4)(activations(samples=10))
