"""The layout of facebookresearch/moco: names, order of the optimiser, and what its own scripts would do with a file."""

import pytest
import torch
from torch import nn

from fastmoco.encoder import build_encoder
from fastmoco.interop import upstream
from fastmoco.runs.run_folder import load


class Moco(nn.Module):
    """The parts of upstream's model that decide the layout: two encoders, queue and pointer, in its order."""

    def __init__(self, recipe) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = build_encoder(recipe), build_encoder(recipe)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", torch.randn(recipe.dim, recipe.queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


class Wrapped(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def packed(make_run, make_recipe, tmp_path):
    recipe = make_recipe("mlp")
    state = make_run(tmp_path / "run", recipe)
    content = load(tmp_path / "run")
    return upstream.pack(content.state, recipe, content.step, 1, 0.03, "fp32"), state, recipe


def test_upstreams_resume_takes_model_and_optimiser(packed):
    """`model.load_state_dict` and `optimizer.load_state_dict`, strictly, as main_moco.py does."""
    content, state, recipe = packed
    model = Wrapped(Moco(recipe))
    assert list(content["state_dict"]) == list(model.state_dict())
    model.load_state_dict(content["state_dict"], strict=True)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.5, weight_decay=0.5)
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["weight_decay"] == 1e-4
    for name, parameter in model.module.encoder_q.named_parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], state[f"velocity.{name}"]), name
    assert all(parameter not in optimizer.state for parameter in model.module.encoder_k.parameters())
    for parameter in model.module.encoder_q.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the settings are whole
    assert set(content) == {"epoch", "arch", "state_dict", "optimizer", "fastmoco"}


def test_the_linear_script_finds_all_but_the_classifier(packed):
    """main_lincls.py: keep module.encoder_q without fc, strip the prefix, only fc may be missing."""
    content, _, recipe = packed
    weights = {
        name.removeprefix("module.encoder_q."): value
        for name, value in content["state_dict"].items()
        if name.startswith("module.encoder_q") and not name.startswith("module.encoder_q.fc")
    }
    classifier = build_encoder(recipe)
    classifier.fc = nn.Linear(classifier.feature_dim, 5)
    assert set(classifier.load_state_dict(weights, strict=False).missing_keys) == {"fc.weight", "fc.bias"}


def test_the_queue_is_transposed_and_fp32(packed):
    content, state, recipe = packed
    queue = content["state_dict"]["module.queue"]
    assert queue.shape == (recipe.dim, recipe.queue_size) and queue.dtype == torch.float32
    assert torch.equal(queue.T, state["queue"])
    assert content["state_dict"]["module.queue_ptr"].tolist() == [7 * 8 % 20]


def test_an_optimiser_in_another_order_is_another_momentum(packed):
    """The control: the order of the indices carries meaning."""
    content, _, recipe = packed
    right = upstream.velocities(content["optimizer"], recipe)
    shifted = {index - 1: value for index, value in content["optimizer"]["state"].items()}
    wrong = upstream.velocities({"state": shifted}, recipe)
    assert not torch.equal(right["bn1.weight"], wrong["bn1.weight"])
    assert upstream.velocities(None, recipe) == {} and upstream.group([]) == {}
