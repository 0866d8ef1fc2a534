"""MoCo v2 by lightly's own example (examples/pytorch/moco.py of lightly 1.6), where lightly and torchvision are there.

Its encoder, head, transforms, loss with a queue of 4,096, momentum update, SGD and DataLoader, at the size of a recipe
and with as many worker processes as there are cores. Not in it: the cosine of the momentum over epochs, which is here
its first value. It differs from the recipe in what lightly leaves out: keys are not shuffled, and the queue holds
whatever batch norm makes of that. `autocast` is the first thing that a user would add.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastmoco.data.manifest import Manifest
from fastmoco.environment import cores
from fastmoco.recipe import Recipe

HAS_LIGHTLY = all(importlib.util.find_spec(name) is not None for name in ("lightly", "torchvision"))
QUEUE, MOMENTUM, RATE = 4096, 0.996, 0.06


class _Images(Dataset):
    def __init__(self, manifest: Manifest, size: int) -> None:
        from lightly.transforms.moco_transform import MoCoV2Transform

        self.paths, self.transform = [manifest.path(i) for i in range(len(manifest))], MoCoV2Transform(input_size=size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


class _Model(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        import torchvision
        from lightly.models.modules import MoCoProjectionHead

        network = getattr(torchvision.models, recipe.arch)()
        width = network.fc.in_features
        self.backbone = nn.Sequential(*list(network.children())[:-1])
        self.head = MoCoProjectionHead(width, width, recipe.dim)
        self.momentum = copy.deepcopy(nn.Sequential(self.backbone, nn.Flatten(), self.head)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(1))


@contextmanager
def training(
    recipe: Recipe, manifest: Manifest, device: torch.device, autocast: torch.dtype | None
) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """Two calls: one trains a step on the next batch of `manifest`, the other throws away what is ready of batches."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import update_momentum

    workers = cores()
    images = _Images(manifest, recipe.crop_size)
    sampler = RandomSampler(images, replacement=True, num_samples=1 << 30)
    loader = DataLoader(images, recipe.batch_size, sampler=sampler, drop_last=True, num_workers=workers)
    model = _Model(recipe).to(device)
    own = nn.Sequential(model.backbone, nn.Flatten(), model.head)
    criterion = NTXentLoss(memory_bank_size=(QUEUE, recipe.dim))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    batches = iter(loader)

    def train() -> None:
        query_view, key_view = next(batches)
        update_momentum(own, model.momentum, m=MOMENTUM)
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            query = model(query_view.to(device))
            with torch.no_grad():
                key = model.momentum(key_view.to(device))
            loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def drain() -> None:
        for _ in range(2 * workers):  # torch's prefetch_factor
            next(batches)

    yield train, drain
