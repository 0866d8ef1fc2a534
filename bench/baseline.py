"""The step as it was published, in plain torch: what a user of the original code runs, and what we must beat.

Order and operations are those of the code that He et al. (2020) released for several GPUs, here on one: momentum update
tensor by tensor, key forward on shuffled images, logits materialised against a copy of the queue, cross-entropy, top-1
and top-5 by sorting, SGD as torch does it by default (on a CPU tensor by tensor, on a GPU in foreach operations),
enqueue at a pointer read by the host. Algorithm 1 of the paper has the momentum update after SGD, which is the same
arithmetic. Nothing in it is slowed down on purpose and nothing is tuned; precision, memory format and torch.compile are
the options a careful user would try first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.recipe import Recipe

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016), batch norm and ReLU as modules of their own."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(inputs, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Block output, of the shape of `x` divided by the stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, the stride on the 3x3 (torchvision's v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = _shortcut(inputs, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Block output, of the shape of `x` divided by the stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class PlainResNet(nn.Module):
    """ResNet with a projection head, from torch's own modules; ValueError on an architecture it does not know."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        if recipe.arch not in BLOCKS:
            raise ValueError(f"the baseline has no {recipe.arch}: use one of {', '.join(BLOCKS)}")
        block = BasicBlock if recipe.arch in ("resnet18", "resnet34") else Bottleneck
        base = round(64 * recipe.width)
        small = recipe.stem == "cifar"
        conv = nn.Conv2d(3, base, 3, 1, 1, bias=False) if small else nn.Conv2d(3, base, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(base), nn.ReLU())
        if not small:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        layers, inputs = [], base
        for stage, count in enumerate(BLOCKS[recipe.arch]):
            planes = base * 2**stage
            for index in range(count):
                layers.append(block(inputs, planes, 2 if stage and not index else 1))
                inputs = planes * block.expansion
        self.layers = nn.Sequential(*layers)
        hidden = [nn.Linear(inputs, inputs), nn.ReLU()] if recipe.head == "mlp" else []
        self.fc = nn.Sequential(*hidden, nn.Linear(inputs, recipe.dim))

    def forward(self, x: Tensor) -> Tensor:
        """Projections [N, dim] of images [N, 3, S, S]."""
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class PublishedStep:
    """One training step on two batches of ready views, float32 [N, 3, S, S]; returns the loss.

    `autocast` is the type to run the encoders in, None for fp32. `compiled` passes both encoders through torch.compile.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        *,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        self.recipe, self.device, self.autocast = recipe, device, autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        torch.backends.cudnn.benchmark = device.type == "cuda" or torch.backends.cudnn.benchmark
        self.encoder_q = PlainResNet(recipe).to(device).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.encoder_k = PlainResNet(recipe).to(device).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.data.copy_(query.data)
            key.requires_grad = False
        wrap: Callable = torch.compile if compiled else (lambda module: module)
        self.forward_q, self.forward_k = wrap(self.encoder_q), wrap(self.encoder_k)
        self.queue = F.normalize(torch.randn(recipe.dim, recipe.check_queue(), device=device), dim=0)
        self.pointer = torch.zeros(1, dtype=torch.long, device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
        self.optimizer = torch.optim.SGD(
            self.encoder_q.parameters(), recipe.base_lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay
        )

    def __call__(self, view_q: Tensor, view_k: Tensor) -> float:
        """Train on one batch of pairs; the loss is read back, as the published code does to print it."""
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            q = F.normalize(self.forward_q(view_q.contiguous(memory_format=self.memory_format)), dim=1)
            k = self._keys(view_k)
            logits, labels = self._logits(q, k)
            loss = F.cross_entropy(logits, labels)
        self._enqueue(k)
        logits.topk(5, 1)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    @torch.no_grad()
    def _keys(self, view_k: Tensor) -> Tensor:
        m = self.recipe.ema_momentum
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.data = key.data * m + query.data * (1 - m)
        order = torch.randperm(view_k.shape[0]).to(self.device)
        shuffled = view_k[order].contiguous(memory_format=self.memory_format)
        return F.normalize(self.forward_k(shuffled), dim=1)[order.argsort()]

    def _logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / self.recipe.temperature
        return logits, torch.zeros(logits.shape[0], dtype=torch.long, device=self.device)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        count, start = keys.shape[0], int(self.pointer)
        if self.recipe.queue_size % count:
            raise ValueError(f"the published queue needs a size that the batch {count} divides")
        self.queue[:, start : start + count] = keys.T.to(self.queue.dtype)
        self.pointer[0] = (start + count) % self.recipe.check_queue()


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
