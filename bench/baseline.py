"""The step as it was published, in plain torch: what a user of the original code runs, and what we must beat.

Of a queue, order and operations are those of the code that He et al. (2020) released, here on one GPU: momentum update
tensor by tensor, key forward on shuffled images, logits materialised against a copy of the queue, cross-entropy, top-1
and top-5 by sorting, SGD as torch does it by default (on a CPU tensor by tensor, on a GPU in foreach operations),
enqueue at a pointer read by the host. Algorithm 1 of the paper has the momentum update after SGD, which is the same
arithmetic. Of a batch it is SimCLR's step (Chen et al., 2020): both views in one forward, logits of all of them, LARS;
or the end-to-end step of MoCo's paper, with shuffled keys. Of a bank it is that of Wu et al. (2018) with InfoNCE, as
MoCo's paper runs it: K entries drawn for the batch. Nothing is slowed down on purpose and nothing is tuned; precision,
memory format and torch.compile are the options a careful user would try first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.bench.losses import plain_nt_xent
from fastmoco.kernels.nt_xent import Form
from fastmoco.recipe import Recipe

ETA = 0.001  # LARS's trust, as SimCLR's code has it
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
    """ResNet with a projection head, of torch's own modules; raises ValueError for an unknown architecture."""

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
        self.fc = _head(recipe.head, inputs, recipe.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Projections [N, dim] of images [N, 3, S, S]."""
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class PlainStep(ABC):
    """One training step on two batches of ready views, float32 [N, 3, S, S]; returns the loss.

    `autocast` is the type to run the encoders in, None for fp32. `compiled` passes them through torch.compile.
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
        self.wrap: Callable = torch.compile if compiled else (lambda module: module)
        torch.backends.cudnn.benchmark = device.type == "cuda" or torch.backends.cudnn.benchmark
        self.encoder_q = self._encoder()
        self.forward_q = self.wrap(self.encoder_q)
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
        kind = Lars if recipe.optimizer == "lars" else torch.optim.SGD
        self.optimizer = kind(
            self.encoder_q.parameters(), recipe.base_lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay
        )

    def __call__(self, view_q: Tensor, view_k: Tensor) -> float:
        """Train on one batch of pairs; the loss is read back, as the published code does to print it."""
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            loss, entries = self.contrast(view_q, view_k)
        self.keep(entries)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    @abstractmethod
    def contrast(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [], and unit vectors [N, D] that `keep` gets."""

    def keep(self, entries: Tensor) -> None:
        """Take in what the dictionary keeps of the batch."""

    def laid_out(self, views: Tensor) -> Tensor:
        """`views` in this step's memory format."""
        return views.contiguous(memory_format=self.memory_format)

    def _encoder(self) -> PlainResNet:
        return PlainResNet(self.recipe).to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]


class PublishedStep(PlainStep):
    """MoCo's: a queue of keys, which a slowly moving encoder makes."""

    def __init__(self, recipe: Recipe, device: torch.device, **options: Any) -> None:
        super().__init__(recipe, device, **options)
        self.encoder_k = self._encoder()
        self.forward_k = self.wrap(self.encoder_k)
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.data.copy_(query.data)
            key.requires_grad = False
        self.queue = F.normalize(torch.randn(recipe.dim, recipe.check_queue(), device=device), dim=0)
        self.pointer = torch.zeros(1, dtype=torch.long, device=device)

    def contrast(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the keys."""
        q = F.normalize(self.forward_q(self.laid_out(view_q)), dim=1)
        k = self._keys(view_k)
        logits, labels = self._logits(q, k)
        logits.topk(5, 1)
        return F.cross_entropy(logits, labels), k

    @torch.no_grad()
    def keep(self, entries: Tensor) -> None:
        """The oldest keys go."""
        count, start = entries.shape[0], int(self.pointer)
        if self.recipe.queue_size % count:
            raise ValueError(f"the published queue needs a size that the batch {count} divides")
        self.queue[:, start : start + count] = entries.T.to(self.queue.dtype)
        self.pointer[0] = (start + count) % self.recipe.check_queue()

    @torch.no_grad()
    def _keys(self, view_k: Tensor) -> Tensor:
        m = self.recipe.ema_momentum
        for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            key.data = key.data * m + query.data * (1 - m)
        order = torch.randperm(view_k.shape[0]).to(self.device)
        return F.normalize(self.forward_k(self.laid_out(view_k[order])), dim=1)[order.argsort()]

    def _logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / self.recipe.temperature
        return logits, torch.zeros(logits.shape[0], dtype=torch.long, device=self.device)


class BatchStep(PlainStep):
    """SimCLR's, or where the recipe is one-sided MoCo's end-to-end step: gradients into both views."""

    def contrast(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and nothing to keep."""
        if self.recipe.symmetric:
            z_a, z_b = self.forward_q(self.laid_out(torch.cat([view_q, view_k]))).chunk(2)
            form: Form = "all" if self.recipe.same_view_negatives else "across"
            return plain_nt_xent(z_a, z_b, self.recipe.temperature, form), z_a
        q = F.normalize(self.forward_q(self.laid_out(view_q)), dim=1)
        order = torch.randperm(view_k.shape[0]).to(self.device)
        k = F.normalize(self.forward_q(self.laid_out(view_k[order])), dim=1)[order.argsort()]
        return F.cross_entropy(q @ k.T / self.recipe.temperature, torch.arange(len(q), device=self.device)), q


class BankStep(PlainStep):
    """The memory bank's: an entry for each of `IMAGES` times the drawn entries, one view a sample."""

    IMAGES = 2

    def __init__(self, recipe: Recipe, device: torch.device, **options: Any) -> None:
        super().__init__(recipe, device, **options)
        images = self.IMAGES * recipe.check_queue()
        self.bank = F.normalize(torch.randn(images, recipe.dim, device=device), dim=1)

    def contrast(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one view, and the queries."""
        q = F.normalize(self.forward_q(self.laid_out(view_q)), dim=1)
        self.ids = torch.randperm(len(self.bank), device=self.device)[: len(q)]
        entries = torch.randint(len(self.bank), (self.recipe.check_queue(),), device=self.device)
        positive = (q * self.bank.index_select(0, self.ids)).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ self.bank.index_select(0, entries).T], dim=1) / self.recipe.temperature
        logits.topk(5, 1)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=self.device)), q

    @torch.no_grad()
    def keep(self, entries: Tensor) -> None:
        """Each image's entry moves towards its query."""
        m = self.recipe.bank_momentum
        mixed = m * self.bank.index_select(0, self.ids) + (1 - m) * entries.float()
        self.bank.index_copy_(0, self.ids, F.normalize(mixed, dim=1))


class Lars(torch.optim.Optimizer):
    """LARS tensor by tensor, as SimCLR's code has it: the rate inside the velocity, batch norm and biases by SGD."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Advance all parameters that have a gradient."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._advance(w, w.grad, **{name: group[name] for name in ("lr", "momentum", "weight_decay")})

    def _advance(self, w: Tensor, grad: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        if w.dim() > 1:
            grad = grad + weight_decay * w
            w_norm, g_norm = w.norm(), grad.norm()
            grad = grad * torch.where((w_norm > 0) & (g_norm > 0), ETA * w_norm / g_norm, 1.0)
        velocity = self.state[w].setdefault("velocity", torch.zeros_like(w))
        velocity.mul_(momentum).add_(grad, alpha=lr)
        w.sub_(velocity)


def plain_step(recipe: Recipe, device: torch.device, **options: Any) -> PlainStep:
    """The step of the recipe's dictionary."""
    return {"queue": PublishedStep, "batch": BatchStep, "bank": BankStep}[recipe.dictionary](recipe, device, **options)


def _head(kind: str, features: int, dim: int) -> nn.Sequential:
    if kind == "mlp-bn":
        hidden, last = (nn.Linear(features, out, bias=False) for out in (features, dim))
        return nn.Sequential(hidden, nn.BatchNorm1d(features), nn.ReLU(), last, nn.BatchNorm1d(dim))
    layers = [nn.Linear(features, features), nn.ReLU()] if kind == "mlp" else []
    return nn.Sequential(*layers, nn.Linear(features, dim))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
