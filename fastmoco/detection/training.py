"""Fine-tuning a detector: SGD by steps that are pure functions of (seed, step), so a resumed run ends like another.

The schedule is detectron2's for VOC with 24,000 steps, stretched over any number: rate 0.02 for 16 images, scaled to
the batch, after a warm-up of 100 steps, divided by ten at 18/24 and 22/24; momentum 0.9, weight decay 1e-4, none on
batch norm. Before the detector is judged batch norm's statistics are taken anew as plain means over some batches
(detectron2's PRECISE_BN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastmoco.contrast.build import BUFFERS
from fastmoco.data.errors import DataError
from fastmoco.detection.average_precision import Detections
from fastmoco.detection.detector import norms
from fastmoco.detection.voc import Picture
from fastmoco.parallel import Parallel
from fastmoco.runs import checkpoint

REFERENCE_BATCH, REFERENCE_RATE = 16, 0.02
WARMUP_STEPS, WARMUP_START = 100, 0.001
DROPS = (18 / 24, 22 / 24)
PRECISE_BATCHES = 200
MOMENTUM, DECAY = 0.9, 1e-4
RANKS = 4096  # more than a seed needs to keep apart

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Plan(NamedTuple):
    """How a detector is trained."""

    steps: int = 24000
    batch_size: int = 16
    """Images of a step, over all ranks."""
    lr: float | None = None
    """Left out, 0.02 x batch size / 16."""
    seed: int = 0

    @property
    def full_rate(self) -> float:
        """Learning rate after the warm-up."""
        return self.lr or REFERENCE_RATE * self.batch_size / REFERENCE_BATCH

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        ready = min(1.0, WARMUP_START + (1 - WARMUP_START) * step / WARMUP_STEPS)
        return self.full_rate * ready * 0.1 ** sum(step >= round(share * self.steps) for share in DROPS)

    def draw(self, step: int, images: int) -> list[tuple[int, bool]]:
        """Image and whether it is flipped, for each slot of a step: each image once before any comes again."""
        slots = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: np.random.default_rng([self.seed, 0, epoch]).permutation(images)
            for epoch in np.unique(slots // images).tolist()
        }
        flips = np.random.default_rng([self.seed, 1, step]).random(self.batch_size) < 0.5
        return [
            (int(orders[at // images][at % images]), bool(flip)) for at, flip in zip(slots.tolist(), flips, strict=True)
        ]


class Shown(torch.utils.data.Dataset):
    """Pictures as tensors: (index, flipped) -> image float [3, H, W] from 0 to 1 and its target."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        index, flipped = item
        picture = self.pictures[index]
        image = read_image(picture.path)
        # The files count pixels from 1 and name the last one; here a box ends where the next pixel begins.
        boxes = torch.from_numpy(picture.objects.boxes.astype(np.float32)) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        if flipped:
            image = image.flip(2)
            boxes = mirrored(boxes, image.shape[2])
        return image, {"boxes": boxes, "labels": torch.from_numpy(picture.objects.labels) + 1}


def read_image(path: Path) -> Tensor:
    """An image file as float [3, H, W] from 0 to 1; raises DataError if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes [n, 4] of an image of `width` pixels after it was flipped left to right."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


class Trainer:
    """A detector in training on one rank."""

    def __init__(self, model: nn.Module, pictures: list[Picture], plan: Plan, parallel: Parallel, threads: int) -> None:
        self.model, self.plan, self.parallel, self.threads = model, plan, parallel, threads
        self.origins = Shown(pictures)
        self.step = 0
        self.whole: nn.Module = model
        if parallel.world > 1:
            devices = [parallel.device] if parallel.device.type == "cuda" else None
            self.whole = nn.parallel.DistributedDataParallel(model, devices, **{BUFFERS: False})  # type: ignore[arg-type]
        scales = {id(value) for norm in norms(model) for value in norm.parameters()}
        parts = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
        for value in model.parameters():
            parts[id(value) in scales].append(value)
        self.optimizer = torch.optim.SGD(
            [{"params": parts[False], "weight_decay": DECAY}, {"params": parts[True], "weight_decay": 0.0}],
            lr=plan.rate(0),
            momentum=MOMENTUM,
        )

    def train(self, until: int, after: Callable[[dict[str, float]], bool]) -> bool:
        """Train up to step `until`. `after` gets each step's losses and says whether to stop; returns whether it did.

        Raises DataError if an image cannot be decoded, FloatingPointError if the loss is not finite.
        """
        self.model.train()
        for images, targets in self._batches(range(self.step, until)):
            rate = self.plan.rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed((self.plan.seed * 1_000_003 + self.step) * RANKS + self.parallel.rank)
            losses = self.whole(images, targets)
            loss = torch.stack(list(losses.values())).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            figures = {"step": self.step, "loss": loss.item(), "lr": rate}
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError(f"the loss became {figures['loss']} in step {self.step}")
            if after(figures | {name: value.item() for name, value in losses.items()}):
                return True
        return False

    def settle_statistics(self, batches: int = PRECISE_BATCHES) -> None:
        """Take batch norm's running statistics anew: means over the next `batches` batches, weights as they are."""
        self.model.train()
        with torch.no_grad():
            for number, (images, targets) in enumerate(self._batches(range(self.step, self.step + batches))):
                for norm in norms(self.model):
                    norm.momentum = 1 / (number + 1)
                torch.manual_seed(self.plan.seed * RANKS + number)
                self.model(images, targets)
        for norm in norms(self.model):
            norm.momentum = 0.1
            # Bessel's correction is for a rank's own number of places, which differs where images do.
            norm.running_var.copy_(self.parallel.mean(norm.running_var))

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        velocities = {
            f"velocity.{name}": self.optimizer.state[value]["momentum_buffer"]
            for name, value in self.model.named_parameters()
            if value in self.optimizer.state
        }
        return {f"detector.{name}": value for name, value in self.model.state_dict().items()} | velocities

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint of `state`."""
        self.step = saved.step
        weights = {name.removeprefix("detector."): value for name, value in saved.state.items()}
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        for name, value in self.model.named_parameters():
            velocity = saved.state.get(f"velocity.{name}")
            if velocity is not None:
                self.optimizer.state[value]["momentum_buffer"] = velocity.to(value.device, copy=True)

    def _batches(self, steps: range) -> Iterator[Batch]:
        share = self.plan.batch_size // self.parallel.world
        mine = slice(self.parallel.rank * share, (self.parallel.rank + 1) * share)
        order = [self.plan.draw(step, len(self.origins))[mine] for step in steps]
        for images, targets in _loader(self.origins, order, self.threads):
            yield _on_device(images, targets, self.parallel.device)


def detect(model: nn.Module, pictures: list[Picture], parallel: Parallel, threads: int) -> list[Detections]:
    """What a detector finds in each picture, on every rank; each rank looks at its share. Labels count from 0."""
    model.eval()
    mine = range(parallel.rank, len(pictures), parallel.world)
    detections: dict[int, Detections] = {}
    with torch.no_grad():
        for index, (images, _) in zip(
            mine, _loader(Shown(pictures), [[(i, False)] for i in mine], threads), strict=True
        ):
            (answer,) = model([image.to(parallel.device) for image in images])
            boxes, labels, scores = (answer[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
            # Back to pixels counted from 1, as the reference program's files have them.
            detections[index] = Detections(boxes + np.array([1, 1, 0, 0], np.float32), labels - 1, scores)
    for part in parallel.gather_objects(detections):
        detections |= part
    return [detections[index] for index in range(len(pictures))]


def _loader(pictures: Shown, order: list[list[tuple[int, bool]]], threads: int) -> Iterator[Any]:
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        pictures,
        batch_sampler=order,
        num_workers=threads,
        collate_fn=_collate,
    )
    return iter(loader)


def _collate(batch: list[tuple[Tensor, Mapping[str, Tensor]]]) -> Any:
    return [image for image, _ in batch], [target for _, target in batch]


def _on_device(images: list[Tensor], targets: list[dict[str, Tensor]], device: torch.device) -> Batch:
    return (
        [image.to(device) for image in images],
        [{name: value.to(device) for name, value in target.items()} for target in targets],
    )
